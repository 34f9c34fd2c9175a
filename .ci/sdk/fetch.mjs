// The TypeScript example with a pointer that has no sha256: fetch.mjs DIRECTORY POINTER BYTES
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const [directory, pointer, bytes] = process.argv.slice(2);
const { Broker } = await import(join(directory, "built/lfs.js"));
const back = await new Broker(process.env.LFS_BROKER_URL).fetch(JSON.parse(readFileSync(pointer)));
assert.deepEqual(Buffer.from(await back.arrayBuffer()), readFileSync(bytes));
