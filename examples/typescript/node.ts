// Uploads a file and fetches it back: node built/node.js FILE TOPIC [KEY]
// LFS_BROKER_URL and, where the broker asks for one, LFS_BROKER_TOKEN say where and who.
import { openAsBlob } from "node:fs";
import { Broker } from "./lfs.js";

const [file, topic, key] = process.argv.slice(2);
if (!file || !topic) throw new Error("node.js FILE TOPIC [KEY]");
const broker = new Broker(process.env["LFS_BROKER_URL"] ?? "http://127.0.0.1:8080", process.env["LFS_BROKER_TOKEN"]);

const pointer = await broker.upload(await openAsBlob(file), { topic, ...(key && { key }) });
console.log(JSON.stringify(pointer));
await broker.fetch(pointer, topic);
