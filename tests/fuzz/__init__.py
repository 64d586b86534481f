"""The fuzzing campaign: thousands of hostile command lines, files, signals and full disks.

`python -m tests.fuzz` runs each case in a fork of one process that has imported everything;
docs/reliability.md describes the cases, what counts as a failure, and the results.

    warm.py       runs command lines in forks
    child.py      turns a fork into a command
    place.py      the folders of a case, with files of a user, and what has happened to them
    materials.py  valid files, from which hostile ones are made
    judge.py      faults in what a command left behind
    campaign.py   cases by number and seed, in several processes
    values.py, flags.py        the flags of all commands, and values for them
    mutations.py, spoiling.py  damage
    bad_*.py                   kinds of hostile files
    and one file per group of cases
"""
