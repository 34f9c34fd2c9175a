// Uploads through the generated client: one PUT, then parts; reads the state, completes, resolves, compares.
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import {
  type CompleteUpload,
  CompletedFromJSON,
  Configuration,
  ErrorCode,
  Mode,
  Next,
  type OpenUpload,
  type Pointer,
  PointersApi,
  ProblemFromJSON,
  ResponseError,
  type SignedPart,
  type SignedRequest,
  UploadState,
  UploadsApi,
} from "./contract";

const PART_SIZE = 5 << 20;
const TOPIC = "sdk-typescript-fetch";
const basePath = process.env["LFS_BROKER_URL"];
assert(basePath, "LFS_BROKER_URL is not set");
const configuration = new Configuration({ basePath });
const uploads = new UploadsApi(configuration);
const pointers = new PointersApi(configuration);

const sha256 = (value: Uint8Array): string => createHash("sha256").update(value).digest("hex");
const open = (openUpload: OpenUpload) => uploads.openUpload({ openUpload });

async function put({ method, url, headers }: SignedRequest | SignedPart, value: Uint8Array<ArrayBuffer>): Promise<void> {
  const answer = await fetch(url, { method, headers, body: value });
  assert(answer.ok, `S3 answered ${answer.status}`);
}

/** Completes. If the broker needs more time, waits until the bytes are verified. */
async function complete(id: string, completeUpload?: CompleteUpload): Promise<Pointer> {
  const completed = await uploads.completeUpload(completeUpload ? { id, completeUpload } : { id });
  switch (completed.state) {
    case "published":
      assert(completed.record.offset >= 0);
      return completed.pointer;
    case "verified":
      return completed.pointer;
    case "completing":
      return verified(id);
  }
}

async function verified(id: string): Promise<Pointer> {
  for (let tries = 0; tries < 6; tries++) {
    const upload = await uploads.getUpload({ id, wait: 10 });
    if (upload.pointer) return upload.pointer;
  }
  throw new Error(`upload ${id} is not verified after a minute`);
}

async function download(pointer: Pointer): Promise<Uint8Array> {
  const resolved = await pointers.resolvePointer({ pointer, topic: TOPIC });
  assert("url" in resolved, "the broker returned a verdict instead of a signed request");
  const answer = await fetch(resolved.url, { method: resolved.method, headers: resolved.headers });
  return new Uint8Array(await answer.arrayBuffer());
}

async function single(): Promise<void> {
  const value = Uint8Array.from(Buffer.from("hello from a generated client"));
  const upload = await open({ topic: TOPIC, key: "single", size: value.length, sha256: sha256(value), headers: { a: "b" } });
  assert(upload.mode === Mode.Single && upload.upload);
  const refused = await uploads.completeUpload({ id: upload.id }).catch((error: unknown) => error);
  assert(refused instanceof ResponseError && refused.response.status === 409);
  assert.equal(ProblemFromJSON(await refused.response.json()).code, ErrorCode.ObjectMissing);
  await put(upload.upload, value);
  assert.deepEqual(await download(await complete(upload.id)), value);
}

async function parts(): Promise<void> {
  const value = Uint8Array.from(randomBytes(2 * PART_SIZE + 17));
  const bytesOf = (part: SignedPart) => value.slice(part.offset, part.offset + part.size);
  const upload = await open({ topic: TOPIC, key: "parts", size: value.length, partSize: PART_SIZE });
  const first = upload.parts?.[0];
  assert(upload.mode === Mode.Multipart && first);
  await put(first, bytesOf(first));
  // A client that has crashed can ask the broker which parts are missing in S3.
  const now = await uploads.getUpload({ id: upload.id });
  assert.equal(now.next, Next.PARTS);
  assert.deepEqual(now.missingParts, [[2, 3]]);
  const signed = await uploads.signParts({ id: upload.id, signParts: { partNumbers: [2, 3] } });
  assert.equal(signed.parts.length, 2);
  for (const part of signed.parts) await put(part, bytesOf(part));
  assert.deepEqual(await download(await complete(upload.id, { sha256: sha256(value) })), value);
}

async function aborted(): Promise<void> {
  const upload = await open({ topic: TOPIC, size: 1, sha256: sha256(new Uint8Array(1)) });
  await uploads.abortUpload({ id: upload.id });
  const history = await uploads.getUploadHistory({ id: upload.id });
  assert.deepEqual(history.items.map((step) => step.to), [UploadState.Open, UploadState.Aborted]);
  const page = await uploads.listUploads({ topic: TOPIC, state: [UploadState.Published] });
  assert.equal(page.items.length, 2);
  assert.equal(page.nextCursor, null);
}

/** Decodes the `completing` response, which a fast broker seldom returns. */
function decodeCompleting(): void {
  const completed = CompletedFromJSON({ id: "01934d2e-7c00-7000-8000-5f2b8c1d9e3a", state: "completing" });
  assert.equal(completed.state, "completing");
}

async function main(): Promise<void> {
  await single();
  await parts();
  await aborted();
  decodeCompleting();
  console.log("typescript-fetch: one PUT and three parts were uploaded, completed, resolved and compared by a generated client");
}

void main();
