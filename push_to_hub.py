"""Publishes a trained directory as a model on the Hugging Face Hub, in one commit.

    python push_to_hub.py runs/mine/final owner/name --dry-run    # list the files and write the card, to be read first
    python push_to_hub.py runs/mine/final owner/name

Log in before with `hf auth login`, or set HF_TOKEN to a token that may write. An upload that fails leaves the repository
as it was, and the same command finishes it; weights that the Hub has already are not sent again.
"""

import argparse
import logging
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from backbones import backbone_revision
from licensing import backbone_licenses, joint_license, write_license_files
from llm_cache import write_whole
from model_card import model_card, modifications, mteb_results
from report import METRICS, draw_layers, has_curves, read_points
from repository import read_record, without_directory

# Files of an earlier upload that go when this one does not have them: stale parts of weights, modules, figures.
REPLACED = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "1_Pooling/*",
    "2_Normalize/*",
    "onnx/*",
    "licenses/*",
    "figures/*",
    "NOTICE",
]
IGNORED = [".*", "*/.*"]
TOKEN_PATTERN = re.compile(rb"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{30,}")


def main():
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="final/ of a training, or the training's directory")
    parser.add_argument("repo_id", metavar="owner/name", help="the repository, created where it does not exist")
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument("--dry-run", action="store_true", help="write the card and list the files; send nothing")
    parser.add_argument("--keep-card", action="store_true", help="send README.md as it lies there, edited by hand")
    parser.add_argument("--license", help="the licence of the backbone whose licence cannot be found out")
    parser.add_argument("--results", default="results/mteb", help="mteb's scores of the model, for the card")
    parser.add_argument("--sweep", default="results/sweep", help="sweeps, whose figures go into the card")
    parser.add_argument("--commit-message", default="Upload the model")
    args = parser.parse_args()
    try:
        api = HfApi()
        directory = prepare(
            args.directory, args.repo_id, api, args.license, args.results, args.sweep, keep_card=args.keep_card
        )
        if args.dry_run:
            print_files(directory)
            print(f"The card is {directory / 'README.md'}. Nothing was sent.")
        else:
            print(push(directory, args.repo_id, api, private=args.private, commit_message=args.commit_message))
    except (ValueError, OSError, httpx2.HTTPError) as error:
        sys.exit(f"push_to_hub.py: {error}")


def prepare(
    directory: Path,
    repo_id: str,
    api: HfApi,
    license: str | None = None,
    results: str = "results/mteb",
    sweep: str = "results/sweep",
    keep_card: bool = False,
) -> Path:
    """Writes the card, the figures and the licence files into `directory` (or its `final/`), which it returns.

    Raises:
        FileNotFoundError: it is not what `train.py` leaves behind.
        UnknownLicenseError: the licence of a backbone is unknown and `license` does not give it.
        ValueError: `repo_id` is not a name, or a file holds a token or a path of this machine.
    """
    directory = directory / "final" if (directory / "final").is_dir() else directory
    record = read_record(directory)
    if keep_card and not (directory / "README.md").exists():
        raise FileNotFoundError(f"--keep-card, but {directory} has no README.md.")
    check_name(repo_id)
    licenses = backbone_licenses(record, api, license)
    joint = joint_license(licenses)
    names = {role: backbone["name"] for role, backbone in record["backbones"].items()}
    write_license_files(directory, licenses, modifications(directory), names, api)
    if not keep_card:
        figures = draw_figures(directory, record, sweep)
        scores = mteb_results(results, backbone_revision(str(directory)))
        card = model_card(directory, repo_id, joint, licenses, scores, figures)
        write_whole(directory / "README.md", lambda path: path.write_text(card.content, encoding="utf-8"))
    refuse_secrets(directory, get_token() if api.token is None else api.token)
    return directory


def draw_figures(directory: Path, record: dict, sweep: str) -> list[str]:
    """The figures of sweeps with the model's backbones over its task: accuracy against the layer."""
    figures = []
    names = {role: backbone["name"] for role, backbone in record["backbones"].items()}
    for (task, recipe, split), points in read_points(sweep).items():
        backbones = next(iter(points.values()))[0]["backbones"]
        swept = {role: without_directory(name) for role, name in backbones.items()}
        if task == record["source"] and recipe != "paper" and swept == names and has_curves(points):
            path = directory / "figures" / f"{task}-{recipe}-{split}-accuracy"
            path.parent.mkdir(exist_ok=True)
            title = f"{task}, trained on its {split} split"
            draw_layers(points, "accuracy", METRICS["accuracy"], title, path, endings=("png",))
            figures.append(f"figures/{path.name}.png")
    return figures


def check_name(repo_id: str):
    """Raises a ValueError unless `repo_id` is `owner/name` as the Hub allows it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(str(error)) from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id} is not owner/name.")


def open_repository(repo_id: str, api: HfApi, private: bool = False) -> str:
    """Creates the repository where it does not exist, which also shows whether the token may write there.

    Returns:
        The repository's newest commit.

    Raises:
        OSError: the Hub refused it or could not be reached; the message says what to do.
        ValueError: `repo_id` is not `owner/name`, or `private` is asked for and the repository is public.
    """
    check_name(repo_id)
    with explained_upload_errors(repo_id, api):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public: nothing was sent. Make it private on the Hub, or leave --private."
        )
    return info.sha


def push(
    directory: Path, repo_id: str, api: HfApi, private: bool = False, commit_message: str = "Upload the model"
) -> str:
    """Uploads what [`prepare`] completed, in one commit; returns the commit's address.

    Raises:
        OSError, ValueError: see [`open_repository`].
    """
    before = open_repository(repo_id, api, private)
    with explained_upload_errors(repo_id, api, before):
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            ignore_patterns=IGNORED,
            delete_patterns=REPLACED,
        )
    return f"{api.endpoint}/{repo_id}/commit/{commit.oid}"


@contextmanager
def explained_upload_errors(repo_id: str, api: HfApi, before: str | None = None):
    """Turns the Hub's and the network's errors into one that says what happened and what to do.

    `before` is the repository's commit when the upload began.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError("Not logged in. Use `hf auth login`, or set HF_TOKEN to a token that may write.") from error
    except (OSError, httpx2.HTTPError, RuntimeError) as error:
        # The cause of a RuntimeError is an error while the weights were sent; Xet's storage has no other kinds.
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        found = {
            401: "The Hub does not accept the token (401). Use `hf auth login`, or set HF_TOKEN to one that may write.",
            403: f"The token may not write to {repo_id} (403): check its role, and the owner's name.",
            404: f"The Hub does not know {repo_id} (404), or the token may not see it.",
            None: f"The upload failed ({type(cause).__name__}: {cause}).",
        }
        message = found.get(status, f"The Hub answered {status}.")
        if before is not None:
            message += f" {_state(repo_id, api, before)} The same command tries again."
        token = get_token() if api.token is None else api.token
        raise OSError(message.replace(token, "***") if token else message) from error


def _state(repo_id: str, api: HfApi, before: str) -> str:
    """What became of the repository after a failure."""
    try:
        after = api.model_info(repo_id).sha
    except (OSError, httpx2.HTTPError):
        return "Whether the repository changed could not be checked."
    return "The repository is as it was." if after == before else f"The Hub did take the commit, {after}."


def refuse_secrets(directory: Path, token: str | None):
    """Raises a ValueError if a file to be sent has a token of the Hub in it, or a path of this machine."""
    home = os.fsencode(Path.home())
    for path in files_to_send(directory):
        if path.suffix in (".safetensors", ".png"):
            continue
        content = path.read_bytes()
        if TOKEN_PATTERN.search(content) or (token and token.encode() in content):
            raise ValueError(f"{path} holds a token of the Hub. Remove it, and revoke the token.")
        if len(home) > 1 and home + b"/" in content:
            raise ValueError(f"{path} names the home directory of this machine. Remove it, then try again.")
        local = re.findall(r'"(/[^"\n]+)"', content.decode(errors="ignore")) if path.parent == directory else []
        if path.suffix == ".json" and path.name != "tokenizer.json" and any(Path(name).exists() for name in local):
            raise ValueError(f"{path} has paths of this machine: {local}. Remove them, then try again.")


def files_to_send(directory: Path) -> list[Path]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(
        filter_repo_objects(files, ignore_patterns=IGNORED, key=lambda path: path.relative_to(directory).as_posix())
    )


def print_files(directory: Path):
    sizes = {path.relative_to(directory): path.stat().st_size for path in files_to_send(directory)}
    for path, size in sizes.items():
        print(f"{size:>15,}  {path}")
    print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files")


if __name__ == "__main__":
    main()
