"""Send an exported folder to the Hugging Face Hub, or to the server that HF_ENDPOINT names."""

from __future__ import annotations

from pathlib import Path

from fifa.config import InputError


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload `folder` as the model `repository` ("user/name"), made if need be; its address.

    Raises InputError with the Hub's reason: no token, no right, no network, no such name.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="d3po export")
    except (HFValidationError, HfHubHTTPError, HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{folder} is written, but {repository} could not be reached: {reason} (log in with "
            "'hf auth login' or set HF_TOKEN, and give --push user/name)"
        ) from error
    return str(made)
