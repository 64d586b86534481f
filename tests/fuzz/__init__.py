"""The campaign: command lines, files, signals and disks that are against us, by the thousand.

`python -m tests.fuzz` tries them, each in a fork of one process that has imported everything;
docs/reliability.md says what is tried, what counts as a failure, and how it went.

    warm.py       command lines in forks
    child.py      what a fork does to be a command
    place.py      the folders a case works in, with files of a user's, and what has become of them
    materials.py  good files, from which bad ones are made
    judge.py      what is wrong with what a command left behind
    campaign.py   cases by number and seed, in several processes
    values.py, flags.py        values, and the flags there are
    mutations.py, spoiling.py  damage
    bad_*.py                   kinds of hostile files
    and a file for each group of cases
"""
