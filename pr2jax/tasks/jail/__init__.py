"""Programs behind `tasks/sandbox.py`: they know the standard library only.

`guard.py` puts `zygote.py` under Landlock and seccomp; `zygote.py` forks a fresh process for every
program, which `monitor.py` watches and `confinement.py` takes the last rights from; `driver.py`
answers calls inside it; `examiner.py` runs a trusted test-suite, in a jail of its own, whose calls
go to the candidate; `plain.py` is how values cross.
"""
