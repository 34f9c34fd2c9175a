"""Uploads through the generated client: one PUT, then parts; reads the state, completes, resolves, compares."""

import hashlib
import os
from uuid import UUID

import httpx
from lfs_broker_client import AuthenticatedClient
from lfs_broker_client.api.pointers import resolve_pointer
from lfs_broker_client.api.uploads import abort_upload, complete_upload, get_upload, get_upload_history, list_uploads, open_upload, sign_parts
from lfs_broker_client.models import (
    Completing,
    CompleteUpload,
    Mode,
    Next,
    OpenUpload,
    OpenUploadHeaders,
    Pointer,
    Problem,
    Published,
    Resolved,
    SignedPart,
    SignedRequest,
    SignParts,
    UploadState,
    Verified,
)
from lfs_broker_client.models import Upload
from lfs_broker_client.types import UNSET

PART_SIZE = 5 << 20
client = AuthenticatedClient(base_url=os.environ["LFS_BROKER_URL"], token="dev needs no token")


def sha256(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()


def opened(request: OpenUpload) -> Upload:
    upload = open_upload.sync(client=client, body=request)
    assert isinstance(upload, Upload), upload
    return upload


def put(request: SignedRequest | SignedPart, value: bytes) -> None:
    httpx.request(request.method, request.url, headers=request.headers.additional_properties, content=value).raise_for_status()


def completed(id: UUID, request: CompleteUpload | None = None) -> Pointer:
    """Completes. If the broker needs more time, waits until the pointer is published."""
    answer = complete_upload.sync(id, client=client, body=request or UNSET)
    match answer:
        case Published():
            assert answer.record.offset >= 0
            return answer.pointer
        case Verified() | Completing():
            return published(id)
        case _:
            raise AssertionError(answer)


def published(id: UUID) -> Pointer:
    for _ in range(6):
        upload = get_upload.sync(id, client=client, wait=10)
        assert isinstance(upload, Upload), upload
        if upload.state is UploadState.PUBLISHED:
            assert isinstance(upload.pointer, Pointer)
            return upload.pointer
    raise AssertionError(f"{id} is not published after a minute")


def download(pointer: Pointer) -> bytes:
    resolved = resolve_pointer.sync(client=client, body=pointer)
    assert isinstance(resolved, Resolved), resolved
    return httpx.request(resolved.method, resolved.url).raise_for_status().content


def single() -> None:
    value = b"hello from a generated client"
    upload = opened(
        OpenUpload(topic="sdk-python", key="single", size=len(value), sha256=sha256(value), headers=OpenUploadHeaders.from_dict({"a": "b"}))
    )
    assert upload.mode is Mode.SINGLE and isinstance(upload.upload, SignedRequest)
    early = complete_upload.sync(upload.id, client=client)
    assert isinstance(early, Problem) and early.code == "object-missing" and early.retryable, early
    put(upload.upload, value)
    assert download(completed(upload.id)) == value


def parts() -> None:
    value = os.urandom(2 * PART_SIZE + 17)
    chunks = [value[at : at + PART_SIZE] for at in range(0, len(value), PART_SIZE)]
    upload = opened(OpenUpload(topic="sdk-python", key="parts", size=len(value), part_size=PART_SIZE))
    assert upload.mode is Mode.MULTIPART and isinstance(upload.parts, list)
    put(upload.parts[0], chunks[0])
    # A client that has crashed can ask the broker which parts are missing in S3.
    now = get_upload.sync(upload.id, client=client)
    assert isinstance(now, Upload) and now.next_ is Next.PARTS and now.missing_parts == [[2, 3]], now
    signed = sign_parts.sync(upload.id, client=client, body=SignParts(part_numbers=[2, 3]))
    assert signed is not None and not isinstance(signed, Problem), signed
    for part in signed.parts:
        put(part, value[part.offset : part.offset + part.size])
    assert download(completed(upload.id, CompleteUpload(sha256=sha256(value)))) == value


def aborted() -> None:
    upload = opened(OpenUpload(topic="sdk-python", size=1, sha256=sha256(b"x")))
    assert abort_upload.sync_detailed(upload.id, client=client).status_code == 204
    history = get_upload_history.sync(upload.id, client=client)
    assert history is not None and not isinstance(history, Problem)
    assert [step.to for step in history.items] == [UploadState.OPEN, UploadState.ABORTED], history
    page = list_uploads.sync(client=client, topic="sdk-python", state=[UploadState.PUBLISHED])
    assert page is not None and not isinstance(page, Problem)
    assert len(page.items) == 2 and page.next_cursor is None, page


single()
parts()
aborted()
print("Python: one PUT and three parts were uploaded, completed, resolved and compared by a generated client")
