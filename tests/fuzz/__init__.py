"""Random files and requests for everything that reads what comes from outside.

    python -m tests.fuzz                          a minute over all readers
    python -m tests.fuzz --runs 1000000           so many inputs in all, however long it takes
    python -m tests.fuzz --seconds 600 config     ten minutes of one reader
    python -m tests.fuzz config --replay FILE     one input again

With atheris installed, inputs are led by the branches of our code that they reach; without it they are mutated blindly.

A reader fails on an input if it raises anything but an EightfoldError or what it documents, takes more than 10 s, or
makes the process larger than 1 GiB.
"""
