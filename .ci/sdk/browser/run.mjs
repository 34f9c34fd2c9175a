// Opens the browser examples in headless Chromium, chooses a file in each, and waits for the result: run.mjs DIRECTORY ORIGIN_FILE
import { spawn } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { createInterface } from "node:readline";
import { join } from "node:path";

const [directory, originFile] = process.argv.slice(2);
// Each page uploads one file in a single PUT and one in parts. (Uppy's parts have 16 MiB.) The broker refuses two of these names as file names.
const examples = [
  { page: "browser.html", size: 3_000_001, name: "a\\b.bin" },
  { page: "browser.html", size: 70 * 1024 * 1024, name: "a.bin", type: "application/x-test" },
  { page: "uppy.html", size: 3_000_001, name: "ä".repeat(128) },
  { page: "uppy.html", size: 16 * 1024 * 1024 + 1, name: "a.bin", type: "application/x-test" },
];

/** The file server that the pages recommend. All requests go through it, so its handling of paths, queries and media types is tested too. */
const files = spawn("python3", ["-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", directory], {
  stdio: ["ignore", "pipe", "ignore"],
});
const [, filesPort] = / port (\d+) /.exec(await new Promise((line) => createInterface(files.stdout).once("line", line)));
process.once("exit", () => files.kill());
process.once("SIGTERM", () => process.exit(143));
async function serveFile(request, response) {
  const file = await fetch(`http://127.0.0.1:${filesPort}${request.url}`, { redirect: "manual" });
  for (const name of ["content-type", "location"]) if (file.headers.has(name)) response.setHeader(name, file.headers.get(name));
  response.writeHead(file.status).end(Buffer.from(await file.arrayBuffer()));
}

/** The page that contains the example in a frame: it chooses a file as a user would, and reports the example's final state. */
const frame = ({ page, size, name, type, broker }) => `<!doctype html><iframe></iframe><script type="module">
  const report = (text) => fetch("/report", { method: "POST", body: text });
  try {
    const frame = document.querySelector("iframe");
    await new Promise((loaded) => { frame.onload = loaded; frame.src = "/${page}?topic=browser&broker=" + encodeURIComponent("${broker}") + "#token=t0ken"; });
    const inside = frame.contentDocument;
    const output = inside.querySelector("pre");
    frame.contentWindow.addEventListener("unhandledrejection", ({ reason }) => report("failed: " + reason));
    // dev needs no token, so check here that requests to the broker have the token, and that no other request has it.
    const { fetch } = frame.contentWindow;
    frame.contentWindow.fetch = (url, options) => {
      const toBroker = String(url).startsWith("${broker}");
      const hasToken = options?.headers?.authorization === "Bearer t0ken";
      if (toBroker !== hasToken) report("failed: " + url + (hasToken ? " got the token" : " got no token"));
      return fetch.call(frame.contentWindow, url, options);
    };
    // Created with the classes of the example's own window, like a file that a user chooses.
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
const server = createServer(async (request, response) => {
  const { pathname } = new URL(request.url, "http://localhost");
  if (request.url.includes("t0ken")) current.report("failed: the page's server saw the token");
  if (pathname === "/report") {
    let text = "";
    for await (const chunk of request) text += chunk;
    response.end();
    return current.report(text);
  }
  if (pathname === "/") return response.setHeader("content-type", "text/html; charset=utf-8").end(frame(current));
  await serveFile(request, response);
});
await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
const origin = `http://127.0.0.1:${server.address().port}`;
await writeFile(originFile, origin);

/** The caller now starts a broker that allows this origin, and then writes the broker's URL to standard input. */
const broker = (await new Promise((line) => process.stdin.once("data", line))).toString().trim();
process.stdin.destroy();

async function run(example) {
  const { page, size, name } = example;
  const profile = await mkdtemp(join(tmpdir(), "lfs-broker-chromium."));
  let report;
  const reported = new Promise((resolve) => (report = resolve));
  current = { ...example, broker, report };
  const flags = ["--headless=new", "--enable-logging=stderr", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"];
  const chromium = spawn("chromium", [...flags, "--no-proxy-server", `--user-data-dir=${profile}`, origin], { stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  chromium.stderr.on("data", (chunk) => (log += chunk));
  const exited = new Promise((resolve) => chromium.once("exit", () => resolve("failed: Chromium exited")));
  const timeout = setTimeout(() => report("failed: the page reported nothing within 90 s"), 90_000);
  const result = await Promise.race([reported, exited]);
  clearTimeout(timeout);
  chromium.kill();
  await exited;
  await rm(profile, { recursive: true, force: true, maxRetries: 5 });
  console.log(`${page}, ${size} bytes as ${name.slice(0, 20)}: ${result}`);
  if (!result.startsWith("done: ") || JSON.parse(result.slice(6)).size !== size) {
    console.log(log.split("\n").filter((line) => line.includes("CONSOLE")).join("\n"));
    process.exitCode = 1;
  }
}

for (const example of examples) await run(example);
server.close();
files.kill();
