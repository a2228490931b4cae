def write_sft(*a):
    pass


def write_rl(*a):
    pass


def write_comparison(*a):
    pass
