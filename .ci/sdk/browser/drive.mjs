// Opens the browser examples in headless Chromium, gives each a file, and waits for what it says: drive.mjs DIRECTORY ORIGIN_FILE
import { spawn } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { createInterface } from "node:readline";
import { join } from "node:path";

const [directory, portFile] = process.argv.slice(2);
// One PUT, and two parts of Uppy's 16 MiB; names and types as files have them, and some that the broker takes for no file's.
const runs = [
  { page: "browser.html", size: 3_000_001, name: "a\\b.bin" },
  { page: "browser.html", size: 70 * 1024 * 1024, name: "a.bin", type: "application/x-test" },
  { page: "uppy.html", size: 3_000_001, name: "ä".repeat(128) },
  { page: "uppy.html", size: 16 * 1024 * 1024 + 1, name: "a.bin", type: "application/x-test" },
];

/** The server that the pages name, and its answer to a request of theirs: what it makes of paths, queries and types is tried too. */
const files = spawn("python3", ["-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", directory], {
  stdio: ["ignore", "pipe", "ignore"],
});
const [, filesPort] = / port (\d+) /.exec(await new Promise((line) => createInterface(files.stdout).once("line", line)));
process.once("exit", () => files.kill());
process.once("SIGTERM", () => process.exit(143));
async function fromFiles(request, answer) {
  const file = await fetch(`http://127.0.0.1:${filesPort}${request.url}`, { redirect: "manual" });
  for (const name of ["content-type", "location"]) if (file.headers.has(name)) answer.setHeader(name, file.headers.get(name));
  answer.writeHead(file.status).end(Buffer.from(await file.arrayBuffer()));
}

/** The page around the example: chooses a file as a person would, and reports what the example says in the end. */
const frame = ({ page, size, name, type, broker }) => `<!doctype html><iframe></iframe><script type="module">
  const report = (text) => fetch("/report", { method: "POST", body: text });
  try {
    const frame = document.querySelector("iframe");
    await new Promise((loaded) => { frame.onload = loaded; frame.src = "/${page}?topic=browser&broker=" + encodeURIComponent("${broker}") + "#token=t0ken"; });
    const inside = frame.contentDocument;
    const output = inside.querySelector("pre");
    frame.contentWindow.addEventListener("unhandledrejection", ({ reason }) => report("failed: " + reason));
    // dev asks for no token: that it is given one is seen here.
    const { fetch } = frame.contentWindow;
    frame.contentWindow.fetch = (url, asked) => {
      const ours = String(url).startsWith("${broker}");
      if (ours !== (asked?.headers?.authorization === "Bearer t0ken")) report("failed: the token goes astray");
      return fetch.call(frame.contentWindow, url, asked);
    };
    // Of the example's own window, as a person's file would be.
    const { DataTransfer, Event, File } = frame.contentWindow;
    const transfer = new DataTransfer();
    const bytes = new Uint8Array(${size}).map((_, at) => at * 31 + (at >> 8));
    transfer.items.add(new File([bytes], ${JSON.stringify(name)}, ${JSON.stringify({ type })}));
    const input = inside.querySelector("input");
    input.files = transfer.files;
    input.dispatchEvent(new Event("change"));
    const wait = setInterval(() => {
      if (output.dataset.state) { clearInterval(wait); report(output.dataset.state + ": " + output.textContent); }
    }, 50);
  } catch (error) { report("failed: " + error); }
</script>`;

let current;
const server = createServer(async (request, answer) => {
  const { pathname } = new URL(request.url, "http://localhost");
  if (request.url.includes("t0ken")) current.report("failed: the page's server saw the token");
  if (pathname === "/report") {
    let text = "";
    for await (const piece of request) text += piece;
    answer.end();
    return current.report(text);
  }
  if (pathname === "/") return answer.setHeader("content-type", "text/html; charset=utf-8").end(frame(current));
  await fromFiles(request, answer);
});
await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
const origin = `http://127.0.0.1:${server.address().port}`;
await writeFile(portFile, origin);

/** Whoever starts this starts the broker next, with our origin allowed, and then says on stdin where it is. */
const broker = (await new Promise((line) => process.stdin.once("data", line))).toString().trim();
process.stdin.destroy();

async function run(asked) {
  const { page, size, name } = asked;
  const profile = await mkdtemp(join(tmpdir(), "lfs-broker-chromium."));
  let said;
  const report = new Promise((resolve) => (said = resolve));
  current = { ...asked, broker, report: said };
  const flags = ["--headless=new", "--enable-logging=stderr", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"];
  const chromium = spawn("chromium", [...flags, "--no-proxy-server", `--user-data-dir=${profile}`, origin], { stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  chromium.stderr.on("data", (piece) => (log += piece));
  const ended = new Promise((resolve) => chromium.once("exit", () => resolve("failed: Chromium ended")));
  const late = setTimeout(() => said("failed: nothing was said for 90 s"), 90_000);
  const answer = await Promise.race([report, ended]);
  clearTimeout(late);
  chromium.kill();
  await ended;
  await rm(profile, { recursive: true, force: true, maxRetries: 5 });
  console.log(`${page}, ${size} bytes as ${name.slice(0, 20)}: ${answer}`);
  if (!answer.startsWith("done: ") || JSON.parse(answer.slice(6)).size !== size) {
    console.log(log.split("\n").filter((line) => line.includes("CONSOLE")).join("\n"));
    process.exitCode = 1;
  }
}

for (const each of runs) await run(each);
server.close();
files.kill();
