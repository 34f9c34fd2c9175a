// What Uppy asks only when an upload is paused, cancelled or fails, asked of the adapter itself: adapter.mjs DIRECTORY
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

/** A file that gives its bytes, or fails to, only when it is told to. */
class Slow extends Blob {
  reads = 0;
  constructor() {
    super([new Uint8Array((16 << 20) + 1)]);
    this.gate = new Promise((give, fail) => Object.assign(this, { give, fail }));
  }
  slice(...range) {
    this.reads++;
    return { arrayBuffer: () => this.gate.then(() => super.slice(...range).arrayBuffer()) };
  }
}
const settled = () => new Promise((done) => setTimeout(done, 50));
const slowly = async (name) => {
  const slow = new Slow();
  const file = uppy.getFile(uppy.addFile({ name, type: "application/x-test", data: slow }));
  return { slow, file, upload: await options.createMultipartUpload(file) };
};

// A file that cannot be read for a while fails when it is asked for, not before, and not for ever.
const unread = await slowly("unread.bin");
unread.slow.fail(new Error("the disk is gone"));
await settled();
await assert.rejects(options.completeMultipartUpload(unread.file, { ...unread.upload, parts: [] }), { message: "the disk is gone" });
unread.slow.gate = Promise.resolve();
await assert.rejects(options.completeMultipartUpload(unread.file, { ...unread.upload, parts: [] }), { code: "parts-incomplete" });

// An upload that was aborted is not read on.
const stopped = await slowly("stopped.bin");
assert.equal(stopped.slow.reads, 1);
await options.abortMultipartUpload(stopped.file, stopped.upload);
stopped.slow.give();
await settled();
assert.equal(stopped.slow.reads, 1);

// Files of one PUT, with Uppy's own steps around them: one whose bytes never go up, one that fails before, and good ones between.
const batch = new Uppy();
const single = lfsBroker(batch, broker, "adapter");
const uploads = new Map();
const odd = { "failed.bin": "error", "missing.bin": "nothing", [`${"ä".repeat(128)}\\.bin`]: "put" };
for (const name of [...Object.keys(odd), "first.bin", "last.bin"]) batch.addFile({ name, type: "", data: new Blob([name]) });
batch.addUploader(async (ids) => {
  for (const id of ids) {
    const file = batch.getFile(id);
    const { method, url, headers } = await single.getUploadParameters(file);
    uploads.set(file.name, headers["x-amz-meta-lfs-upload-id"]);
    if (odd[file.name] === "error") batch.emit("upload-error", file, new Error("the network is gone"));
    else if (odd[file.name] === "nothing") continue;
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
