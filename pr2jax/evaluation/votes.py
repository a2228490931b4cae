"""What a response answers, as a text that equals that of others which answer the same."""

from pr2jax.tasks import answers
from pr2jax.tasks.base import Problem, domain_of, extract_response, normalise


def answer_key(problem: Problem, response: str) -> str | None:
    r"""The answer that a majority vote counts, case and spacing aside; None where there is none.

    Found where the problem's verifier looks: by its `response_regex`, else by domain in a box or
    answer tag (math, science, tabular, logic), a fenced block (code), [ANSWER] tags or JSON
    (simulation). A source of no domain (reasoning-gym's own) is answered by the whole response.
    Equal answers written differently (0.5, 1/2) are two.
    """
    found = _found(problem, response)
    return normalise(found) or None if found is not None else None


def _found(problem: Problem, response: str) -> str | None:
    if problem.meta.get("response_regex"):
        return extract_response(problem, response)
    domain = domain_of(problem)
    if domain == "other" or "/" in problem.data_source:
        return response
    if domain == "code":
        return answers.last_code(response, ("python", "py"))
    if domain == "simulation":
        block = answers.answer_block(response)
        if block is not None:
            return block
        good, value = answers.json_answer(response)
        return repr(value) if good else None
    places = ("tag", "boxed") if domain == "logic" else ("boxed", "tag")
    return answers.short_answer(response, places)
