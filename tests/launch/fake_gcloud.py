"""A gcloud that bills nobody: `gcloud ARGUMENT...`, with its world in the folder FAKE_GCLOUD.

calls.jsonl gets a line a call. scenario.json says what goes wrong; state.json is what there is.
A slice has workers, folders that are their homes: what is sent to them by ssh runs there, for real,
with the tools of FAKE_GCLOUD/vm before all others.

scenario.json, all optional:
  workers            of a slice (2)
  states             what describe says, one after the other, before ACTIVE
  create_errors      messages with which the first calls of create fail
  fail               {"WORD": N}: the first N calls whose text has WORD fail (N = -1: all)
  preempt            {"1": N}: the first slice is taken away at its N-th poll
"""

# Few imports: it is started hundreds of times.
import json
import os
import signal
import sys

ROOT = os.environ["FAKE_GCLOUD"]


def fail(text):
    """gcloud's way to end."""
    print(f"ERROR: (gcloud.compute.tpus) {text}", file=sys.stderr)
    sys.exit(1)


def read(name, otherwise):
    """A JSON file of this world."""
    if not os.path.exists(f"{ROOT}/{name}"):
        return otherwise
    with open(f"{ROOT}/{name}") as file:
        return json.load(file)


def home(state, worker):
    """Where a worker of the present slice lives."""
    return f"{ROOT}/slice{state['made']}/worker{worker}"


def tool(*words):
    """Runs a program."""
    os.spawnvp(os.P_WAIT, words[0], words)


def take_away(state, scenario):
    """The slice's machines stop, and their disks are lost."""
    for worker in range(scenario.get("workers", 2)):
        try:
            with open(f"{home(state, worker)}/pr2jax_run/pid") as file:
                os.killpg(int(file.read()), signal.SIGKILL)
        except (OSError, ValueError):
            pass
    tool("rm", "-rf", f"{ROOT}/slice{state['made']}")
    state["lost"] = True


def ssh(state, scenario, command):
    """Runs `command` on all workers; the worst exit code."""
    if not state["exists"] or state["lost"]:
        fail("[255] ssh: connect to host: Connection refused")
    if command.endswith(" poll"):
        state["polls"] += 1
        if state["polls"] == scenario.get("preempt", {}).get(str(state["made"])):
            take_away(state, scenario)
            fail("[255] ssh: connection reset")
    worst = 0
    for worker in range(scenario.get("workers", 2)):
        where = home(state, worker)
        path = f"{ROOT}/vm:{os.environ['PATH']}"
        environment = os.environ | {"HOME": where, "PATH": path, "FAKE_WORKER": str(worker)}
        shell = ["bash", "-c", f"cd && {command}"]
        worst = max(worst, os.spawnvpe(os.P_WAIT, "bash", shell, environment))
    return worst


def queued_resources(state, scenario, verb):
    """create, describe and delete."""
    if verb == "create":
        if state["exists"]:
            fail("ALREADY_EXISTS: Resource 'my-run' already exists")
        state["creates"] += 1
        errors = scenario.get("create_errors", [])
        if state["creates"] <= len(errors):
            fail(errors[state["creates"] - 1])
        state |= {"exists": True, "lost": False, "polls": 0, "made": state["made"] + 1}
        for worker in range(scenario.get("workers", 2)):
            os.makedirs(home(state, worker))
        return
    if not state["exists"]:
        fail("NOT_FOUND: Resource 'my-run' was not found")
    if verb == "delete":
        take_away(state, scenario)
        state["exists"] = False
    elif verb == "describe":
        states = scenario.get("states", [])
        state["asked"] += 1
        waiting = states[state["asked"] - 1] if state["asked"] <= len(states) else "ACTIVE"
        if states and states[-1] == "FOREVER" and state["asked"] >= len(states):
            waiting = states[-2]
        print("SUSPENDED" if state["lost"] else waiting)


def tpu_vm(state, scenario, verb, arguments):
    """describe, scp and ssh."""
    if verb == "describe":
        if not state["exists"]:
            fail("NOT_FOUND")
        count = scenario.get("workers", 2)
        asks_state = any("value(state)" in a for a in arguments)
        print("READY" if asks_state else ";".join(f"10.0.0.{i}" for i in range(count)))
        return 0
    if verb == "scp":
        if state["lost"]:
            fail("[255] scp: connection refused")
        source, target = arguments[0], arguments[1].partition(":")[2]
        for worker in range(scenario.get("workers", 2)):
            tool("cp", source, f"{home(state, worker)}/{target}")
        return 0
    assert verb == "ssh", verb
    command = next(a for a in arguments if a.startswith("--command=")).partition("=")[2]
    return ssh(state, scenario, command)


def main():
    """One call."""
    arguments = sys.argv[1:]
    if arguments[:2] == ["storage", "cp"]:  # of a worker: the slice knows nothing of it
        target = ROOT + "/" + arguments[-1].removeprefix("gs://")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        sys.exit(tool("cp", arguments[-2], target))
    scenario = read("scenario.json", {})
    new = {"exists": False, "lost": False, "made": 0, "creates": 0, "asked": 0, "polls": 0}
    state = read("state.json", new | {"failed": {}})
    with open(f"{ROOT}/calls.jsonl", "a") as file:
        file.write(json.dumps(arguments) + "\n")
    assert arguments[:2] == ["compute", "tpus"], arguments
    code = 0
    try:
        for word, times in scenario.get("fail", {}).items():
            failed = state["failed"].get(word, 0)
            if word in " ".join(arguments) and (times < 0 or failed < times):
                state["failed"][word] = failed + 1
                fail("[255] kex_exchange_identification: Connection closed by remote host")
        kind, verb, name, *rest = arguments[2:]
        if kind == "queued-resources":
            assert "--project=my-project" in rest
            assert "--zone=us-east5-a" in rest
            queued_resources(state, scenario, verb)
        else:
            code = tpu_vm(state, scenario, verb, [name, *rest] if verb == "scp" else rest)
    finally:
        with open(f"{ROOT}/state.json", "w") as file:
            json.dump(state, file)
    sys.exit(code)


main()
