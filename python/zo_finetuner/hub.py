"""A finished run on the Hugging Face Hub: the model with its card, and what it takes to check it.

Asked before the first step, for a run of hours should not end at a missing login; what cannot be sent at the end stays
in the run's folder, and the error says how to send it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zo_finetuner.errors import InputError

FILES = ("journal.zoj", "config.yaml", "result.json", "log.jsonl", "curve.png")  # beside the model's own


def require_hub(repo: str) -> None:
    """InputError for a name that is no USER/NAME, and where nobody is logged in."""
    if repo.count("/") != 1 or any(not part or part != part.strip() for part in repo.split("/")):
        raise InputError(f'push_to_hub "{repo}": give USER/NAME')
    try:
        _api().whoami()
    except Exception as error:  # no token, no network, a token that has expired: huggingface_hub has a class for each
        raise InputError(f"push_to_hub {repo}: the Hub does not know you ({_brief(error)}); hf auth login") from None


def push_run(out: Path, repo: str, private: bool = True) -> str:
    """Send OUT/model and FILES to the repository, which is made where there is none; returns its address."""
    api = _api()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(out / "model"), commit_message="Model and card")
        for name in FILES:
            if (out / name).is_file():
                api.upload_file(
                    repo_id=repo, path_or_fileobj=str(out / name), path_in_repo=name, commit_message=f"Run: {name}"
                )
    except Exception as error:
        raise InputError(f"push_to_hub {repo}: {_brief(error)}; the run is whole in {out}: "
                         f"hf upload {repo} {out / 'model'}") from None
    return str(url)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
