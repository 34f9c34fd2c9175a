// Downloads a pointer that has no sha256 with the TypeScript example, and compares the bytes: fetch.mjs DIRECTORY POINTER FILE
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const [directory, pointer, expected] = process.argv.slice(2);
const { Broker } = await import(join(directory, "built/lfs.js"));
const downloaded = await new Broker(process.env.LFS_BROKER_URL).fetch(JSON.parse(readFileSync(pointer)));
assert.deepEqual(Buffer.from(await downloaded.arrayBuffer()), readFileSync(expected));
