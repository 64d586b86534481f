"""The campaign: command lines, files, signals and disks that are against us, by the thousand.

`python -m tests.fuzz` tries them, each in a fork of one process that has imported everything;
docs/reliability.md says what is tried, what counts as a failure, and how it went.

    warm.py       command lines in forks
    place.py      the folders a case works in, with files of a user's, and what has become of them
    materials.py  good files, from which bad ones are made
    judge.py      what is wrong with what a command left behind
    campaign.py   cases by number and seed, in several processes
    values.py, mutations.py, flags.py   values, damage, and the flags there are
    and a file for each group of cases
"""
