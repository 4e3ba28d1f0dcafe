"""What both engines share: the operation, the device bank it reads, and the sites where it acts."""
