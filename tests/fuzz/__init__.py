"""Fuzzing of all that reads what others wrote: `make test` tries a little of it, `make fuzz` the full budgets."""

from tests.fuzz import directions, files, specs

SURFACES = (directions.SURFACE, *specs.SURFACES, *files.SURFACES)
