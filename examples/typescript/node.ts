// Uploads a file and downloads it again: node built/node.js FILE TOPIC [KEY]
// LFS_BROKER_URL is the broker (http://127.0.0.1:8080 by default). LFS_BROKER_TOKEN is the token, if the broker requires one.
import { openAsBlob } from "node:fs";
import { Broker } from "./lfs.js";

const [file, topic, key] = process.argv.slice(2);
if (!file || !topic) throw new Error("node.js FILE TOPIC [KEY]");
const broker = new Broker(process.env["LFS_BROKER_URL"] ?? "http://127.0.0.1:8080", process.env["LFS_BROKER_TOKEN"]);

const pointer = await broker.upload(await openAsBlob(file), { topic, ...(key && { key }) });
console.log(JSON.stringify(pointer));
await broker.fetch(pointer, topic);
