"""The mini world: captioned scenes whose truth is known exactly, to judge learning without people.

request  = sample_request(rng)        what a prompt asks for
prompt   = phrase(request, rng)       in words; `parse` reads it back
image    = render(compose(request, rng))
verdict  = check(image, prompt)       which conditions hold, by classical vision
"""

from fifa.miniworld.captions import (
    Group,
    Request,
    UnparsedPrompt,
    parse,
    phrase,
    prompts,
    sample_request,
)
from fifa.miniworld.scenes import Scene, Thing, compose, render, sample_scene
from fifa.miniworld.vocabulary import IMAGE_SIZE

__all__ = [
    "IMAGE_SIZE",
    "Group",
    "Request",
    "Scene",
    "Thing",
    "UnparsedPrompt",
    "compose",
    "parse",
    "phrase",
    "prompts",
    "render",
    "sample_request",
    "sample_scene",
]
