"""What an answer must look like to be carried out on the device."""

from collections.abc import Collection

from shadowpeft.train.answers import REMOTE, first_call


def skill_name(call: str) -> str:
    """``move(steps=3)`` -> ``move``."""
    return call.partition("(")[0]


def reason_to_escalate(text: str, skills: Collection[str] | None) -> str | None:
    """Why the device cannot carry an answer out; None if it can, or if there is no grammar (``skills`` None).

    ``no_call``: it is no skill call. ``remote``: the shadow itself asks for the cloud. ``unknown_skill``: a call of
    something the device does not have.
    """
    if skills is None:
        return None
    call = first_call(text)
    if call is None:
        return "no_call"
    if call == REMOTE:
        return "remote"
    return None if skill_name(call) in skills else "unknown_skill"
