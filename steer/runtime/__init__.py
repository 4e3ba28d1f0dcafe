"""What both engines share: the operation, the device table it reads, and the sites where it acts."""
