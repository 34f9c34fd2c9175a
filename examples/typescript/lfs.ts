// Uploads through lfs-broker and downloads, in a browser and in node. It uses only fetch and Blob.
import { sha256 } from "@noble/hashes/sha2.js";
import { bytesToHex } from "@noble/hashes/utils.js";

export interface Signed {
  method: "PUT" | "GET";
  url: string;
  headers: Record<string, string>;
}

export interface SignedPart extends Signed {
  part_number: number;
  offset: number;
  size: number;
}

/** The value of the record in Kafka. */
export interface Pointer {
  kfs_lfs: number;
  bucket: string;
  key: string;
  size: number;
  /** Absent if the topic's policy allows another checksum, or none. */
  sha256?: string;
}

/** An upload as the broker returns it. openapi/openapi.json has the other members. */
export interface Upload {
  id: string;
  state: "open" | "completing" | "verified" | "published" | "aborted" | "expired" | "rejected";
  mode: "single" | "multipart";
  object_key: string;
  upload?: Signed;
  part_size?: number;
  part_count?: number;
  uploaded_parts?: { part_number: number; size: number }[];
  pointer?: Pointer;
  error?: { code: string; detail: string };
}

/** An error response of the broker (RFC 9457). */
export class BrokerError extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    detail: string,
  ) {
    super(`${code}: ${detail}`);
  }
}

export class Broker {
  constructor(
    private readonly url: string,
    private readonly token?: string,
  ) {}

  async call<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
    const answer = await fetch(this.url + path, {
      method,
      headers: { "content-type": "application/json", ...(this.token && { authorization: `Bearer ${this.token}` }) },
      ...(body !== undefined && { body: JSON.stringify(body) }),
      ...(signal && { signal }),
    });
    const json = answer.status === 204 ? undefined : await answer.json();
    if (!answer.ok) throw new BrokerError(answer.status, json.code, json.detail);
    return json;
  }

  signPart(id: string, part_number: number, signal?: AbortSignal): Promise<SignedPart> {
    const signed = this.call<{ parts: [SignedPart] }>("POST", `/lfs/uploads/${id}/parts`, { part_numbers: [part_number] }, signal);
    return signed.then(({ parts }) => parts[0]);
  }

  /** Completes, and waits until the bytes are verified: there is no pointer before. */
  async complete(id: string, sha256?: string, signal?: AbortSignal): Promise<Pointer> {
    let upload = await this.call<Upload>("POST", `/lfs/uploads/${id}/complete`, sha256 ? { sha256 } : {}, signal);
    while (!upload.pointer) {
      if (upload.state === "completing") {
        upload = await this.call<Upload>("GET", `/lfs/uploads/${id}?wait=30`, undefined, signal);
      } else if (upload.state === "open") {
        // The completion ended without a result. Complete again to continue, or to get the reason.
        upload = await this.call<Upload>("POST", `/lfs/uploads/${id}/complete`, sha256 ? { sha256 } : {}, signal);
      } else {
        throw new BrokerError(422, upload.error?.code ?? upload.state, upload.error?.detail ?? "");
      }
    }
    return upload.pointer;
  }

  /** Uploads bytes to a topic, in one PUT or in parts as the broker chooses. */
  async upload(bytes: Blob, declared: { topic: string; key?: string; filename?: string }): Promise<Pointer> {
    const upload = await this.call<Upload>("POST", "/lfs/uploads", { ...declared, size: bytes.size, sha256: await hashed(bytes) });
    if (upload.upload) {
      await put(upload.upload, bytes);
    }
    for (let number = 1; number <= (upload.part_count ?? 0); number++) {
      // Each part is signed just before it is sent, because a URL expires during a long upload.
      const part = await this.signPart(upload.id, number);
      await put(part, bytes.slice(part.offset, part.offset + part.size));
    }
    return this.complete(upload.id);
  }

  /**
   * Downloads the object of a pointer, and compares its size and its sha256 (if the pointer has one). With the topic of
   * the record, the broker refuses a pointer that was copied from another topic.
   */
  async fetch(pointer: Pointer, topic?: string): Promise<Blob> {
    const query = topic === undefined ? "" : `?topic=${encodeURIComponent(topic)}`;
    const { url } = await this.call<Signed>("POST", `/lfs/resolve${query}`, pointer);
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(`S3 answered ${answer.status}`);
    const bytes = await answer.blob();
    if (bytes.size !== pointer.size) throw new Error(`declared ${pointer.size} bytes, found ${bytes.size}`);
    const found = await hashed(bytes);
    if (pointer.sha256 && found !== pointer.sha256.toLowerCase()) throw new Error(`declared ${pointer.sha256}, found ${found}`);
    return bytes;
  }
}

/** The file's name as a member of the open request. Omitted if the broker would refuse it, so that the upload succeeds. */
export function named(filename: string): { filename?: string } {
  const refused = /[/\\\p{Cc}]/u.test(filename) || filename === "." || filename === ".." || filename === "";
  return refused || new TextEncoder().encode(filename).length > 255 ? {} : { filename };
}

/** The SHA-256 of all bytes, which are read in chunks of 4 MiB. */
export async function hashed(bytes: Blob, signal?: AbortSignal): Promise<string> {
  const hash = sha256.create();
  const chunkSize = 4 << 20;
  for (let offset = 0; offset < bytes.size; offset += chunkSize) {
    signal?.throwIfAborted();
    hash.update(new Uint8Array(await bytes.slice(offset, offset + chunkSize).arrayBuffer()));
  }
  return bytesToHex(hash.digest());
}

/** The headers to send: all that were signed except `content-length`, which a browser sets itself. */
export function headersOf({ headers }: Signed): Record<string, string> {
  return Object.fromEntries(Object.entries(headers).filter(([name]) => name.toLowerCase() !== "content-length"));
}

async function put(signed: Signed, bytes: Blob): Promise<void> {
  const answer = await fetch(signed.url, { method: signed.method, headers: headersOf(signed), body: bytes });
  if (!answer.ok) throw new Error(`S3 answered ${answer.status}`);
}
