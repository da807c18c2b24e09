"""A tiny chat model and small chat servers on this machine, for the tests of the judges."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from fifa.judge import rubric

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = [
    "a red circle above a blue square",
    "two small green triangles",
    "portrait of an old fisherman, oil painting, warm evening light, highly detailed",
    "x",
    "ein blaues Haus am See",
    "sdfkj sdlfkj",
    "a cat, a dog, a bird, a fish, a horse, a cow, a sheep, a goat and a very small mouse",
]

# What the model learns to answer to each: now this, now that, so that means are no whole numbers.
GRADES = [(3, 3, 4), (7, 7, 8), (10, 10, 9), (0,), (8, 8, 6), (1,), (10, 10, 1)]


def build_chat_model(folder: Path, ten_is_one_token: bool = False) -> Path:
    """Save a two-layer Llama with a byte-pair tokenizer that learnt the rubric's own text.

    All weights are random but the output layer's, which is fitted to answer with a grade and the
    end of the turn.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(ten_is_one_token)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config)
        _fit_output(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(ten_is_one_token: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=not ten_is_one_token)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([rubric.TEMPLATE, *PROMPTS, *["10"] * 50], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def _fit_output(model: Any, tokenizer: Any) -> None:
    """Teach the output layer alone that grades follow a chat, and the end follows a grade."""
    states, targets = [], []
    for prompt, grades in zip(PROMPTS, GRADES, strict=True):
        chat = tokenizer.apply_chat_template(
            rubric.messages(prompt), tokenize=False, add_generation_prompt=True
        )
        for grade in grades:
            text = f"{chat}{grade}<|im_end|>"
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                hidden = model.model(ids).last_hidden_state[0]
            tail = len(tokenizer(str(grade))["input_ids"]) + 1
            states.append(hidden[-1 - tail : -1])
            targets.append(ids[0, -tail:])
    state, target = torch.cat(states), torch.cat(targets)
    optimizer = torch.optim.Adam(model.lm_head.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.lm_head(state), target).backward()
        optimizer.step()


# ---- servers -------------------------------------------------------------------------------------

Answer = Callable[["Chat", dict[str, Any]], None]


class ChatServer(ThreadingHTTPServer):
    """Answers each prompt by its list of actions, one a request; then, and else, by `default`."""

    daemon_threads = True

    def __init__(self, default: Answer, **actions: list[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Chat)
        self.default, self.actions = default, dict(actions)
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.times: list[float] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Chat(BaseHTTPRequestHandler):
    server: ChatServer
    running = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = prompt_of(body)
        server = self.server
        with server.lock:
            server.asked[prompt] += 1
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.times.append(time.monotonic())
            self.running = True
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            actions = server.actions.get(prompt, [])
            action = actions.pop(0) if actions else server.default
        try:
            action(self, body)
        finally:
            self._done()

    def _done(self) -> None:
        """Count this request as running no longer, once."""
        with self.server.lock:
            self.server.running -= self.running
            self.running = False

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._done()  # before the client can know, and ask for the next
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


def prompt_of(body: dict[str, Any]) -> str:
    """The prompt under judgment, read back from the rubric's data line."""
    (message,) = body["messages"]
    line = re.search(r'^\{"prompt": .*\}$', message["content"], re.MULTILINE)
    assert line is not None
    prompt: str = json.loads(line.group())["prompt"]
    return prompt


@contextlib.contextmanager
def serving(default: Answer, **actions: list[Answer]) -> Iterator[ChatServer]:
    """A server for the length of a block."""
    server = ChatServer(default, **actions)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def says(content: Any, logprobs: Any = None) -> Answer:
    """A chat completion with this content."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}}
    body = json.dumps({"choices": [choice | ({"logprobs": logprobs} if logprobs else {})]})
    return lambda chat, _: chat.reply(200, body.encode())


def fails(status: int, text: str = "no", **headers: str) -> Answer:
    """An error in the form of OpenAI."""
    body = json.dumps({"error": {"message": text}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda chat, _: chat.reply(status, body, named)


def hangs(seconds: float) -> Answer:
    """Silence for a while, then a proper answer that nobody waits for."""

    def act(chat: Chat, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        with contextlib.suppress(OSError):
            says("3")(chat, body)

    return act


def cuts(chat: Chat, _: dict[str, Any]) -> None:
    """Promise a body, send half of it, and reset the connection."""
    chat.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [')
    chat.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    chat.connection.close()


def raw(body: bytes) -> Answer:
    """Status 200 with any body."""
    return lambda chat, _: chat.reply(200, body)


def generates(folder: Path) -> Answer:
    """Greedy answers of a chat model with the log-probabilities of 20 alternatives a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    lock = threading.Lock()

    def act(chat: Chat, body: dict[str, Any]) -> None:
        ids = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with lock, torch.inference_mode():
            out = model.generate(
                **ids,
                do_sample=False,
                max_new_tokens=body["max_tokens"],
                return_dict_in_generate=True,
                output_scores=True,
            )
        new = out.sequences[0, ids["input_ids"].shape[1] :].tolist()
        content = [_alternatives(tokenizer, s[0], t) for s, t in zip(out.scores, new, strict=True)]
        if new[-1] == tokenizer.eos_token_id:
            content, new = content[:-1], new[:-1]
        says(tokenizer.decode(new), {"content": content})(chat, body)

    return act


def _alternatives(tokenizer: Any, logits: torch.Tensor, token: int) -> dict[str, Any]:
    logps = logits.log_softmax(-1)
    top = [
        {"token": tokenizer.decode([i]), "logprob": float(logps[i])}
        for i in logps.topk(20).indices.tolist()
    ]
    return {
        "token": tokenizer.decode([token]),
        "logprob": float(logps[token]),
        "top_logprobs": top,
    }
