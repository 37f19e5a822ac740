"""Requests that V2 hears of anew after a preemption, and what each of them should answer.

What such a request had generated is then part of its prompt. So where attention is approximate its
answer goes on as that of a new request with this prompt would, not as if nothing had happened.
"""

from contextlib import contextmanager

from tests.models import scheduler_of


@contextmanager
def resumptions(llm):
    """List them: the prompt, and how many generated tokens have become part of it."""
    scheduler, seen = scheduler_of(llm), []
    schedule = scheduler.schedule

    def listed(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            generated = len(new.prefill_token_ids) - len(new.prompt_token_ids)
            if generated:
                seen.append((list(new.prompt_token_ids), generated))
        return output

    scheduler.schedule = listed
    yield seen
    del scheduler.schedule


def resumed_answer(prompt, seen, tokens, answer):
    """Return the answer of a request that was resumed.

    Args:
        prompt: The request's.
        seen: All resumptions.
        tokens: Of the answer.
        answer: From a prompt to its greedy answer, of a request that has the engine to itself.
    """
    found = []
    for end in (*(n for of, n in seen if of == prompt), tokens):
        found += answer([*prompt, *found])[: end - len(found)]
    return found
