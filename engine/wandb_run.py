"""wandb, kept at arm's length: no run ever fails because of it, or waits for it for ever."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from cli import sentence

WandbMode = Literal["off", "offline", "online"]
ANSWER_SECONDS = 3
PATIENCE = 60  # seconds for a call


class WandbRun:
    """A wandb run; its first failure is reported, and it is silent from then on."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.has_failed = False

    def log(self, values: dict[str, float], step: int) -> None:
        self._call(self.run.log, values, step=step)

    def finish(self) -> None:
        self._call(self.run.finish)

    def _call(self, function: Callable[..., object], *values: Any, **named: Any) -> None:
        if self.has_failed:
            return
        try:
            in_time(function, *values, **named)
        except Exception as error:  # wandb raises many kinds, and none is worth the run
            why = reason_of(error)
            print(f"wandb: it failed ({why}), so the rest of this run is not logged there")
            self.has_failed = True


def reason_of(error: Exception) -> str:
    return "no answer" if isinstance(error, TimeoutError) else sentence(error) or repr(error)


def in_time(function: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """Call a function in a thread; return its result. Raises TimeoutError if it takes too long.

    The thread may then wait for ever, but keeps no process from ending.
    """
    answer: Future[Any] = Future()

    def call() -> None:
        try:
            answer.set_result(function(*values, **named))
        except BaseException as error:  # which is raised below
            answer.set_exception(error)

    Thread(target=call, daemon=True).start()
    return answer.result(PATIENCE)


def start_wandb(mode: WandbMode, out_dir: Path, config: dict[str, Any]) -> WandbRun | None:
    """Start a wandb run; None if it is off, or does not start, which is said."""
    if mode == "off":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb starts
    try:
        import wandb  # slow to import, and rarely wanted

        if mode == "online" and (reason := in_time(why_offline)):
            print(f"wandb: {reason}, so this run is logged offline; `wandb sync` sends it later")
            mode = "offline"
        about = {"project": "glassgpt", "dir": out_dir, "mode": mode, "config": config}
        return WandbRun(in_time(wandb.init, **about, settings=wandb.Settings(init_timeout=20)))
    except Exception as error:  # as above
        why = reason_of(error)
        print(f"wandb: it did not start ({why}), so this run is logged in {out_dir} only")
        return None


def why_offline() -> str | None:
    """Return why a run cannot go online, or None; wandb.init takes longer to find out."""
    import requests
    import wandb

    server = wandb.setup().settings.base_url
    if not os.environ.get("WANDB_API_KEY") and not requests.utils.get_netrc_auth(server):
        return "nobody is logged in (`wandb login`)"
    try:
        requests.head(server, timeout=ANSWER_SECONDS)
    except requests.RequestException:
        return "its server does not answer"
    return None
