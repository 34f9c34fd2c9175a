// What Uppy asks only when an upload is paused or cancelled, asked of the adapter itself: adapter.mjs DIRECTORY
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const directory = process.argv[2];
const { Uppy } = await import(createRequire(join(directory, "x.js")).resolve("@uppy/core"));
const { Broker } = await import(join(directory, "built/lfs.js"));
const { lfsBroker } = await import(join(directory, "built/uppy.js"));

const broker = new Broker(process.env.LFS_BROKER_URL);
const uppy = new Uppy();
const options = lfsBroker(uppy, broker, "adapter");
const bytes = new Blob([new Uint8Array((16 << 20) + 1)]);
const file = uppy.getFile(uppy.addFile({ name: "a.bin", type: "application/x-test", data: bytes }));

assert.equal(options.shouldUseMultipart(file), true);
assert.equal(options.getChunkSize({ size: 10_000 * (16 << 20) + 1 }), 17 << 20);
const upload = await options.createMultipartUpload(file);
assert.deepEqual(await options.listParts(file, upload), []);
const { method, url, headers } = await options.signPart(file, { ...upload, partNumber: 2, body: bytes });
assert.equal((await fetch(url, { method, headers, body: bytes.slice(16 << 20) })).status, 200);
assert.deepEqual(await options.listParts(file, upload), [{ PartNumber: 2, Size: 1, ETag: "" }]);
await assert.rejects(options.completeMultipartUpload(file, { ...upload, parts: [] }), { code: "parts-incomplete" });
await options.abortMultipartUpload(file, upload);
assert.equal((await broker.call("GET", `/lfs/uploads/${upload.uploadId}`)).state, "aborted");
