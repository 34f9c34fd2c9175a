// Calls the adapter's options that Uppy calls only if an upload is paused, cancelled or fails: adapter.mjs DIRECTORY
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

/** A blob whose reads wait until `allow` or `fail` is called. */
class BlockedBlob extends Blob {
  reads = 0;
  constructor() {
    super([new Uint8Array((16 << 20) + 1)]);
    this.result = new Promise((allow, fail) => Object.assign(this, { allow, fail }));
  }
  slice(...range) {
    this.reads++;
    return { arrayBuffer: () => this.result.then(() => super.slice(...range).arrayBuffer()) };
  }
}
/** Waits until the callbacks of a finished read have run. */
const callbacksRun = () => new Promise((done) => setTimeout(done, 50));
const openBlocked = async (name) => {
  const blob = new BlockedBlob();
  const file = uppy.getFile(uppy.addFile({ name, type: "application/x-test", data: blob }));
  return { blob, file, upload: await options.createMultipartUpload(file) };
};

// A read error is reported by complete, not before. The next complete reads the file again.
const unreadable = await openBlocked("unreadable.bin");
unreadable.blob.fail(new Error("the disk is gone"));
await callbacksRun();
await assert.rejects(options.completeMultipartUpload(unreadable.file, { ...unreadable.upload, parts: [] }), { message: "the disk is gone" });
unreadable.blob.result = Promise.resolve();
await assert.rejects(options.completeMultipartUpload(unreadable.file, { ...unreadable.upload, parts: [] }), { code: "parts-incomplete" });

// Hashing stops when the upload is aborted.
const stopped = await openBlocked("stopped.bin");
assert.equal(stopped.blob.reads, 1);
await options.abortMultipartUpload(stopped.file, stopped.upload);
stopped.blob.allow();
await callbacksRun();
assert.equal(stopped.blob.reads, 1);

// Single PUTs in Uppy's own sequence: the bytes of one file are never sent, one file fails before its PUT, and the others succeed.
const batch = new Uppy();
const single = lfsBroker(batch, broker, "adapter");
const uploads = new Map();
const outcomes = { "failed.bin": "error", "missing.bin": "skip", [`${"ä".repeat(128)}\\.bin`]: "put" };
for (const name of [...Object.keys(outcomes), "first.bin", "last.bin"]) batch.addFile({ name, type: "", data: new Blob([name]) });
batch.addUploader(async (ids) => {
  for (const id of ids) {
    const file = batch.getFile(id);
    const { method, url, headers } = await single.getUploadParameters(file);
    uploads.set(file.name, headers["x-amz-meta-lfs-upload-id"]);
    if (outcomes[file.name] === "error") batch.emit("upload-error", file, new Error("the network is gone"));
    else if (outcomes[file.name] === "skip") continue;
    else assert.equal((await fetch(url, { method, headers, body: file.data })).status, 200);
  }
});
const { successful, failed } = await batch.upload();
assert.deepEqual(failed.map(({ name }) => name), ["failed.bin", "missing.bin"]);
assert.deepEqual(failed.map(({ error }) => error.replace(/:.*/, "")), ["the network is gone", "Error"]);
assert.match(failed[1].error, /object-missing/);
assert.equal(successful.length, 3);
for (const { name, id } of successful) {
  const { pointer } = batch.getFile(id).response.body;
  assert.equal(await (await broker.fetch(pointer)).text(), name);
}
for (const { name } of failed) assert.equal((await broker.call("GET", `/lfs/uploads/${uploads.get(name)}`)).state, "aborted", name);
