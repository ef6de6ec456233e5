"""The real control and the real worker, with a fault that can be asked for: SIGUSR1 blocks a worker's loop for long.

The supervisor takes them when WAKEFRONT_ROLES names this package. A stopped process shows that a frozen one is
replaced; this shows it of one that runs and answers nothing.
"""
