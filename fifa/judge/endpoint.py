"""Any OpenAI-compatible chat server as the judge: vLLM, Ollama, `transformers serve`, a paid one.

Many prompts are asked about at once, each answer is handed on as it arrives. What a server cannot
do (JSON schema, log-probabilities) is found out once and left away. A server that fails is asked
again, later and later; one that fails for many prompts in a row ends the pass, so that a dead
server does not leave a data set full of gaps.
"""

from __future__ import annotations

import email.utils
import itertools
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from fifa.config import InputError, fingerprint
from fifa.judge import Quality, collect, rubric

if TYPE_CHECKING:
    import httpx2

KEY_VARIABLE = "FIFA_JUDGE_API_KEY"  # environment variable that holds the server's key, if any
FEATURES = ("response_format", "logprobs")  # sent until the server refuses them
REFUSES_REQUEST = {400, 422}
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
MOST_TOKENS = 24  # of an answer: {"score": 10} and some space
LEAST_MASS = 0.5  # of probability on grades; below, log-probabilities are not used
AMBIGUOUS = 0.01  # of probability on a "1" that may be the beginning of "10"
FAILED_IN_A_ROW = 16  # prompts, after all their attempts
RUN_AGAIN = "see to it and run again, answers so far are kept"


class EndpointJudge:
    """`<model>@<base url>`, such as `qwen2.5:7b@http://localhost:11434/v1`.

    The score is the mean grade under the answer's log-probabilities where the server tells them,
    otherwise the grade it wrote. A malformed answer is asked for again and then set aside with a
    reason. The key is read from the environment variable `key_variable` and goes nowhere but into
    the request's header. Raises InputError for a bad address, a key that is refused, a model that
    is not there, and a server that keeps failing.
    """

    def __init__(
        self,
        target: str,
        *,
        concurrency: int = 8,
        attempts: int = 5,
        timeout: float = 60.0,
        backoff: float = 0.5,
        patience: float = 600.0,
        requests_per_second: float | None = None,
        key_variable: str = KEY_VARIABLE,
        extra: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Times are in seconds; `extra` is put into every request's body, None takes a key out."""
        self.model, self.url = _split(target)
        self.extra = dict(extra or {})
        self.name = f"openai:{self.model}@{self.url}:{rubric.VERSION}"
        if self.extra:
            self.name += f":{fingerprint(json.dumps(self.extra, sort_keys=True))}"
        if concurrency < 1 or attempts < 1:
            raise InputError("a judge's concurrency and attempts must be at least 1")
        if min(timeout, backoff, patience) <= 0:
            raise InputError("a judge's timeout, backoff and patience must be above 0 seconds")
        if requests_per_second is not None and requests_per_second <= 0:
            raise InputError("a judge's requests_per_second must be above 0")
        self.concurrency, self.attempts, self.seed = concurrency, attempts, seed
        self.timeout, self.backoff, self.patience = timeout, backoff, patience
        self.key_variable = key_variable
        self._gate = _Gate(1 / requests_per_second if requests_per_second else 0.0)
        self._features = _Features()
        self._failed = 0  # prompts in a row

    def score(self, prompts: Sequence[str]) -> list[Quality]:
        """Judge each prompt by itself."""
        return collect(self.stream(prompts))

    def stream(self, prompts: Sequence[str]) -> Iterator[tuple[int, Quality]]:
        """Answers as they arrive, of `concurrency` requests at a time.

        Closing the iterator drops the requests that wait and lets the others end.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        with self._client() as client:
            try:
                ask = partial(self._judge, client, stop)
                for index, outcome in _as_they_arrive(pool, ask, prompts, 2 * self.concurrency):
                    self._count(outcome)
                    yield index, outcome.quality
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _count(self, outcome: _Outcome) -> None:
        """Raise when the server failed for more prompts in a row than could be to blame."""
        self._failed = self._failed + 1 if outcome.server_failed else 0
        if self._failed >= FAILED_IN_A_ROW:
            self._failed = 0
            raise InputError(
                f"the judge's server {self.url} failed for {FAILED_IN_A_ROW} prompts in a row, "
                f"{outcome.quality.reason}; {RUN_AGAIN}"
            )

    def _client(self) -> httpx2.Client:
        import httpx2

        key = self._key()
        loopback = httpx2.URL(self.url).host in {"localhost", "127.0.0.1", "::1"}
        return httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.timeout,
            limits=httpx2.Limits(max_connections=self.concurrency),
            trust_env=not loopback,  # no proxy between this machine and itself
        )

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise InputError(
                f"the environment variable {self.key_variable} holds no key: only visible ASCII "
                f"characters can be sent"
            )
        return key

    # ---- one prompt ----

    def _judge(self, client: httpx2.Client, stop: threading.Event, prompt: str) -> _Outcome:
        """Ask until there is an answer, at most `attempts` times."""
        objection = rubric.objection(prompt)
        if objection is not None:
            return _Outcome(Quality(None, objection))
        rng = random.Random(f"{self.seed} {rubric.as_data(prompt)}")  # the same in any thread
        failure = _Failure("the pass was stopped")
        malformed = 0
        for attempt in range(self.attempts):
            pause = 0.0 if attempt == 0 else self.backoff * 2 ** (attempt - 1) * rng.uniform(0.5, 1)
            if not self._gate.enter(stop, pause):
                break
            reply = self._ask(client, prompt, malformed)
            if isinstance(reply, Quality):
                return _Outcome(reply)
            failure = reply
            if failure.final:
                break
            malformed += not failure.server_failed
            self._hold_back(failure.retry_after)
        return self._given_up(failure, attempt + 1)

    def _hold_back(self, seconds: float) -> None:
        """Wait with all threads as long as the server asks: the limit is not the prompt's."""
        if seconds > self.patience:
            raise InputError(
                f"the judge's server {self.url} asks to wait {seconds:.0f} seconds, more than the "
                f"patience of {self.patience:.0f}; run again later, answers so far are kept"
            )
        if seconds > 0:
            self._gate.pause(seconds)

    def _given_up(self, failure: _Failure, attempts: int) -> _Outcome:
        """No answer for this prompt; InputError where no other prompt would get one either."""
        why = f"{failure.why} (attempts: {attempts})"
        if failure.down:
            raise InputError(f"the judge's server {self.url}: {why}; {RUN_AGAIN}")
        return _Outcome(Quality(None, why), failure.server_failed)

    def _ask(self, client: httpx2.Client, prompt: str, malformed: int) -> Quality | _Failure:
        """One request; without the features that the server turns out to refuse, one more each."""
        import httpx2

        features = self._features.now
        while True:
            try:
                response = client.post(
                    f"{self.url}/chat/completions", json=self._body(prompt, features, malformed)
                )
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                down = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
                return _Failure(f"no answer, {_kind(error)}", server_failed=True, down=down)
            if response.status_code not in REFUSES_REQUEST or not features:
                break
            if self._features.proven:  # so it is the prompt that is refused, not the feature
                break
            features = _fewer(features, response.text)
        if response.status_code == 200:
            self._features.prove(features)
            return _read(response)
        return self._refused(response)

    def _body(self, prompt: str, features: frozenset[str], malformed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": rubric.messages(prompt),
            "max_tokens": MOST_TOKENS,
            "temperature": 0.0,
        }
        if malformed:  # the likeliest answer was no grade: draw others, the same in every run
            body |= {"temperature": 0.7, "seed": self.seed + malformed}
        if "response_format" in features:
            schema = {"name": "grade", "strict": True, "schema": rubric.SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if "logprobs" in features:
            body |= {"logprobs": True, "top_logprobs": 20}
        return {key: value for key, value in (body | self.extra).items() if value is not None}

    def _refused(self, response: httpx2.Response) -> _Failure:
        """What an answer other than 200 means."""
        status = response.status_code
        said = self._without_key(_said(response))
        if status in TRY_AGAIN:
            return _Failure(
                f"it answers {status}: {said}",
                server_failed=True,
                down=status == 429,
                retry_after=_retry_after(response.headers),
            )
        if status in REFUSES_REQUEST | {413}:
            return _Failure(f"the server refuses the prompt with {status}: {said}", final=True)
        hint = {
            401: f"set the environment variable {self.key_variable} to its key",
            403: f"is the key in {self.key_variable} allowed to use the model?",
            404: "is the model's name right, and does the address end in /v1?",
        }.get(status, "is this the address of an OpenAI-compatible server?")
        raise InputError(f"the judge's server {self.url} answers {status}: {said}; {hint}")

    def _without_key(self, text: str) -> str:
        """Some servers repeat the key in their complaint."""
        key = self._key()
        return text.replace(key, "***") if key else text


class _Outcome(NamedTuple):
    quality: Quality
    server_failed: bool = False


class _Failure(NamedTuple):
    """Why a request brought no grade: the server's failure, or else a malformed answer."""

    why: str
    server_failed: bool = False
    down: bool = False  # no connection or over the rate limit: it would fail for any prompt
    final: bool = False  # asking again would not help
    retry_after: float = 0.0  # seconds the server asked for


def _as_they_arrive(
    pool: Executor, ask: Callable[[str], _Outcome], prompts: Sequence[str], most: int
) -> Iterator[tuple[int, _Outcome]]:
    """Index and outcome of each prompt; at most `most` of them are under way."""
    jobs = enumerate(prompts)
    waiting: dict[Future[_Outcome], int] = {}
    while True:
        for index, prompt in itertools.islice(jobs, most - len(waiting)):
            waiting[pool.submit(ask, prompt)] = index
        if not waiting:
            return
        done = wait(waiting, return_when=FIRST_COMPLETED).done
        # an exception comes last, so that the answers beside it are not lost
        for job in sorted(done, key=lambda job: job.exception() is not None):
            yield waiting.pop(job), job.result()


# ---- the address and what a server can do --------------------------------------------------------


def _split(target: str) -> tuple[str, str]:
    """`<model>@<base url>` -> model and address without a slash at its end."""
    import httpx2

    match = re.fullmatch(r"(?P<model>\S+?)@(?P<url>https?://[^\s?#]+)", target)
    if match is None:
        raise InputError(
            f"the judge 'openai:{target}' must look like openai:<model>@<base url>, such as "
            f"openai:qwen2.5:7b@http://localhost:11434/v1"
        )
    url = match["url"].rstrip("/")
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InputError(f"the address of the judge's server, '{url}', is none: {error}") from None
    if "@" in url:
        raise InputError(
            f"the address of the judge's server holds a name or password; put the key into the "
            f"environment variable {KEY_VARIABLE}"
        )
    return match["model"], url


class _Features:
    """What the server takes, shared by all threads; settled by the first answer."""

    def __init__(self) -> None:
        self.now = frozenset(FEATURES)
        self.proven = False
        self._lock = threading.Lock()

    def prove(self, features: frozenset[str]) -> None:
        with self._lock:
            if not self.proven:
                self.now, self.proven = features, True


def _fewer(features: frozenset[str], complaint: str) -> frozenset[str]:
    """Without the feature that the server complains about, or else the first of FEATURES."""
    words = {"response_format": ("response_format", "json_schema", "schema"), "logprobs": ("logp",)}
    for feature in FEATURES:
        if feature in features and any(word in complaint for word in words[feature]):
            return features - {feature}
    return features - {next(feature for feature in FEATURES if feature in features)}


class _Gate:
    """When the next request may go: not before the server said, nor faster than `spacing` (s)."""

    def __init__(self, spacing: float) -> None:
        self.spacing = spacing
        self._next = 0.0
        self._lock = threading.Lock()

    def pause(self, seconds: float) -> None:
        """No request of any thread for this long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def enter(self, stop: threading.Event, pause: float) -> bool:
        """Wait `pause` seconds and for one's turn; False if `stop` was set meanwhile."""
        if stop.wait(pause):
            return False
        while True:
            with self._lock:
                now = time.monotonic()
                left = self._next - now
                if left <= 0:
                    self._next = now + self.spacing
                    return not stop.is_set()
            if stop.wait(left):
                return False


# ---- reading an answer ---------------------------------------------------------------------------


def _read(response: httpx2.Response) -> Quality | _Failure:
    """The grade in a body of status 200: its mean by log-probabilities, or as it is written."""
    try:
        choice = response.json()["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return _Failure(f"no chat completion: {_short(response.text)}", server_failed=True)
    grade = rubric.parse(content) if isinstance(content, str) else None
    if grade is None:
        return _Failure(f"no grade from 0 to 10: {_short(content)}")
    mean = mean_grade(content, choice.get("logprobs"))
    if mean is not None:
        return Quality(round(mean, 3), f"mean grade, answered {grade}")
    return Quality(float(grade), f"answered {grade}")


def mean_grade(content: str, logprobs: Any) -> float | None:
    """Mean of the grade by the log-probabilities of its token, or None where they cannot tell.

    `logprobs` is that of a chat completion: for each token, up to 20 alternatives. They cannot tell
    if grades have less than LEAST_MASS of the probability, or if a "1" may begin a "10" unseen.
    """
    try:
        tokens = logprobs["content"]
        at = _grade_token(content, [token["token"] for token in tokens])
        chances = _grades(tokens[at]["top_logprobs"])
        after = tokens[at + 1]["top_logprobs"] if at + 1 < len(tokens) else []
        ten = _chance_of_zero(after) if tokens[at]["token"].strip() == "1" else None
    except (KeyError, TypeError, IndexError, ValueError, AttributeError):
        return None
    if 10 not in chances and chances.get(1, 0.0) > AMBIGUOUS:
        if ten is None:
            return None
        chances[10] = chances[1] * ten
        chances[1] -= chances[10]
    mass = sum(chances.values())
    if not LEAST_MASS <= mass <= 1.01:  # also NaN
        return None
    return sum(grade * chance for grade, chance in chances.items()) / mass


def _grade_token(content: str, tokens: list[str]) -> int:
    """Index of the token that the grade in `content` begins in."""
    match = re.search(r"\d", content)
    begin = 0
    for index, token in enumerate(tokens):
        if match is not None and begin <= match.start() < begin + len(token):
            return index
        begin += len(token)
    raise ValueError("the tokens do not spell the answer")


def _grades(alternatives: list[dict[str, Any]]) -> dict[int, float]:
    """Grade -> probability, of the alternatives of one token; " 7" is a 7."""
    chances: dict[int, float] = {}
    for alternative in alternatives:
        grade = rubric.parse(alternative["token"])
        if grade is not None:
            chances[grade] = chances.get(grade, 0.0) + math.exp(alternative["logprob"])
    return chances


def _chance_of_zero(alternatives: list[dict[str, Any]]) -> float | None:
    """Probability that a 0 follows a 1, None where the server does not tell."""
    if not alternatives:
        return None
    return math.fsum(math.exp(a["logprob"]) for a in alternatives if a["token"][:1] == "0")


def _retry_after(headers: httpx2.Headers) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 without one."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _said(response: httpx2.Response) -> str:
    """The server's complaint, in whichever of the usual places it stands."""
    try:
        body = response.json()
        error = body.get("error", body.get("detail", body.get("message", body)))
        text = error["message"] if isinstance(error, dict) and "message" in error else error
    except (ValueError, AttributeError, RecursionError):
        text = response.text
    return _short(text)


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else f"{text[:160]}..."


def _kind(error: Exception) -> str:
    return f"{type(error).__name__} {_short(error)}".strip()
