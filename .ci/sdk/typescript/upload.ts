// Uploads through the generated types: one PUT, then parts; reads the state, completes, resolves, compares.
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import createClient from "openapi-fetch";
import type { components, paths } from "./contract.js";

type Schemas = components["schemas"];

const PART_SIZE = 5 << 20;
const baseUrl = process.env["LFS_BROKER_URL"];
assert(baseUrl, "LFS_BROKER_URL is not set");
const api = createClient<paths>({ baseUrl });

const sha256 = (value: Uint8Array): string => createHash("sha256").update(value).digest("hex");

async function open(body: Schemas["OpenUpload"]): Promise<Schemas["Upload"]> {
  const { data, error } = await api.POST("/lfs/uploads", { body });
  if (error) throw new Error(`${error.code}: ${error.detail}`);
  return data;
}

async function put(request: Schemas["SignedRequest"], value: Uint8Array<ArrayBuffer>): Promise<void> {
  const answer = await fetch(request.url, { method: request.method, headers: request.headers, body: value });
  assert(answer.ok, `S3 answered ${answer.status}`);
}

/** Completes. If the broker needs more time, waits until the bytes are verified. */
async function complete(id: string, body?: Schemas["CompleteUpload"]): Promise<Schemas["Pointer"]> {
  const { data, error } = await api.POST("/lfs/uploads/{id}/complete", { params: { path: { id } }, ...(body && { body }) });
  if (error) throw new Error(`${error.code}: ${error.detail}`);
  switch (data.state) {
    case "published":
      assert(data.record.offset >= 0);
      return data.pointer;
    case "verified":
      return data.pointer;
    case "completing":
      return verified(id);
  }
}

async function verified(id: string): Promise<Schemas["Pointer"]> {
  for (let tries = 0; tries < 6; tries++) {
    const { data, error } = await api.GET("/lfs/uploads/{id}", { params: { path: { id }, query: { wait: 10 } } });
    if (error) throw new Error(`${error.code}: ${error.detail}`);
    if (data.pointer) return data.pointer;
  }
  throw new Error(`upload ${id} is not verified after a minute`);
}

async function download(pointer: Schemas["Pointer"]): Promise<Uint8Array> {
  const { data, error } = await api.POST("/lfs/resolve", { body: pointer });
  if (error) throw new Error(`${error.code}: ${error.detail}`);
  assert("url" in data, "the broker returned a verdict instead of a signed request");
  const answer = await fetch(data.url, { method: data.method, headers: data.headers });
  return new Uint8Array(await answer.arrayBuffer());
}

async function single(): Promise<void> {
  const value = Uint8Array.from(Buffer.from("hello from a generated client"));
  const upload = await open({ topic: "sdk-typescript", key: "single", size: value.length, sha256: sha256(value), headers: { a: "b" } });
  assert(upload.mode === "single" && upload.upload);
  const early = await api.POST("/lfs/uploads/{id}/complete", { params: { path: { id: upload.id } } });
  assert.equal(early.error?.code, "object-missing");
  await put(upload.upload, value);
  assert.deepEqual(await download(await complete(upload.id)), value);
}

async function parts(): Promise<void> {
  const value = Uint8Array.from(randomBytes(2 * PART_SIZE + 17));
  const bytesOf = (part: Schemas["SignedPart"]) => value.slice(part.offset, part.offset + part.size);
  const upload = await open({ topic: "sdk-typescript", key: "parts", size: value.length, part_size: PART_SIZE });
  const first = upload.parts?.[0];
  assert(upload.mode === "multipart" && first);
  await put(first, bytesOf(first));
  // A client that has crashed can ask the broker which parts are missing in S3.
  const now = await api.GET("/lfs/uploads/{id}", { params: { path: { id: upload.id } } });
  assert.equal(now.data?.next, "parts");
  assert.deepEqual(now.data?.missing_parts, [[2, 3]]);
  const signed = await api.POST("/lfs/uploads/{id}/parts", { params: { path: { id: upload.id } }, body: { part_numbers: [2, 3] } });
  assert.equal(signed.data?.parts.length, 2);
  for (const part of signed.data?.parts ?? []) await put(part, bytesOf(part));
  assert.deepEqual(await download(await complete(upload.id, { sha256: sha256(value) })), value);
}

async function aborted(): Promise<void> {
  const upload = await open({ topic: "sdk-typescript", size: 1, sha256: sha256(new Uint8Array(1)) });
  const path = { id: upload.id };
  assert.equal((await api.DELETE("/lfs/uploads/{id}", { params: { path } })).response.status, 204);
  const history = await api.GET("/lfs/uploads/{id}/history", { params: { path } });
  assert.deepEqual(history.data?.items.map((step) => step.to), ["open", "aborted"]);
  const query = { topic: "sdk-typescript", state: ["published" as const] };
  const page = await api.GET("/lfs/uploads", { params: { query } });
  assert.equal(page.data?.items.length, 2);
  assert.equal(page.data?.next_cursor, null);
}

await single();
await parts();
await aborted();
console.log("TypeScript: one PUT and three parts were uploaded, completed, resolved and compared by a generated client");
