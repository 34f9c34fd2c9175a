// Options for Uppy's @uppy/aws-s3 (version 5): it uploads directly to S3, and lfs-broker publishes the pointers to Kafka.
import type { AwsS3Options } from "@uppy/aws-s3";
import type { Uppy, UppyFile } from "@uppy/core";
import { Broker, hashed, headersOf, named, type Pointer, type Signed, type Upload } from "./lfs.js";

export type FileMeta = Record<string, unknown> & { name: string };
export type FileBody = Record<string, unknown> & { pointer?: Pointer };
type File = UppyFile<FileMeta, FileBody>;
type Options = Extract<
  AwsS3Options<FileMeta, FileBody>,
  { signPart: unknown; getUploadParameters: unknown; shouldUseMultipart: (file: File) => boolean }
>;

const MIB = 1 << 20;

/** The part size to request: at least 16 MiB, and at most 10,000 parts. */
function partSize({ size }: { size: number }): number {
  return Math.max(16, Math.ceil(size / 10_000 / MIB)) * MIB;
}

/**
 * Options for `uppy.use(AwsS3, lfsBroker(uppy, broker, topic))`. Once a file is uploaded, its `response.body.pointer` is
 * the value of the record in Kafka.
 *
 * A file of one part is uploaded in one PUT. Uppy calls no option afterwards, so a post-processor completes the upload.
 */
export function lfsBroker(uppy: Uppy<FileMeta, FileBody>, broker: Broker, topic: string): Options {
  const single = new Map<string, string>();
  const hashes = new Map<string, { sha256: Promise<string>; stop: AbortController }>();

  const data = (file: File): Blob => {
    if (!(file.data instanceof Blob)) throw new Error(`the data of ${file.name} is not in this page`);
    return file.data;
  };
  /** Hashes while the parts are uploaded. Complete awaits the hash, so an error is reported there and ignored here. */
  const startHash = (file: File, upload: string): Promise<string> => {
    const stop = new AbortController();
    const sha256 = hashed(data(file), stop.signal);
    sha256.catch(() => undefined);
    hashes.set(upload, { sha256, stop });
    return sha256;
  };
  const stopHash = (upload: string): void => {
    hashes.get(upload)?.stop.abort();
    hashes.delete(upload);
  };
  const setPointer = (file: File, pointer: Pointer): void => {
    uppy.setFileState(file.id, { response: { status: 200, body: { pointer } } });
  };
  const declared = (file: File) => ({
    topic,
    key: file.name,
    ...named(file.name),
    size: data(file).size,
    ...(file.type && { content_type: file.type }),
  });
  // If this fails too, the upload expires.
  const abort = (upload: string) => broker.call("DELETE", `/lfs/uploads/${upload}`).catch(() => undefined);

  // The error of one file is stored in its state: an error thrown by a post-processor would end the whole batch.
  uppy.addPostProcessor(async (ids) => {
    for (const id of ids) {
      const upload = single.get(id);
      if (!upload) continue;
      single.delete(id);
      // Undefined if the file was removed in the meantime.
      const file: File | undefined = uppy.getFile(id);
      if (!file || file.error) {
        await abort(upload);
        continue;
      }
      try {
        setPointer(file, await broker.complete(upload));
      } catch (error) {
        await abort(upload);
        uppy.setFileState(id, { error: String(error) });
      }
    }
  });

  return {
    shouldUseMultipart: (file) => data(file).size > partSize(data(file)),
    getChunkSize: partSize,

    async getUploadParameters(file) {
      const upload = await broker.call<Upload>("POST", "/lfs/uploads", { ...declared(file), sha256: await hashed(data(file)) });
      if (!upload.upload) throw new Error(`the broker requires a multipart upload for ${file.name}, a file of one part`);
      single.set(file.id, upload.id);
      return { method: "PUT", url: upload.upload.url, headers: headersOf(upload.upload) };
    },

    async createMultipartUpload(file) {
      const upload = await broker.call<Upload>("POST", "/lfs/uploads", { ...declared(file), part_size: partSize(data(file)) });
      void startHash(file, upload.id);
      return { uploadId: upload.id, key: upload.object_key };
    },

    async signPart(_file, { uploadId, partNumber, signal }) {
      const part = await broker.signPart(uploadId, partNumber, signal);
      return { method: "PUT", url: part.url, headers: headersOf(part) };
    },

    async listParts(_file, { uploadId, signal }) {
      const upload = await broker.call<Upload>("GET", `/lfs/uploads/${uploadId}`, undefined, signal);
      return (upload.uploaded_parts ?? []).map((part) => ({ PartNumber: part.part_number, Size: part.size, ETag: "" }));
    },

    async completeMultipartUpload(file, { uploadId, key, signal }) {
      const sha256 = await (hashes.get(uploadId)?.sha256 ?? startHash(file, uploadId)).catch((error) => {
        // The next attempt hashes again.
        stopHash(uploadId);
        throw error;
      });
      const pointer = await broker.complete(uploadId, sha256, signal);
      stopHash(uploadId);
      return { location: key, pointer };
    },

    async abortMultipartUpload(_file, { uploadId }) {
      if (!uploadId) return;
      stopHash(uploadId);
      await broker.call("DELETE", `/lfs/uploads/${uploadId}`);
    },

    uploadPartBytes: ({ signature, body, onProgress, onComplete, signal }) =>
      putWithProgress({ method: "PUT", url: signature.url, headers: signature.headers ?? {} }, body, onProgress, onComplete, signal),
  };
}

/** Uppy's own function requires an ETag, which a page can read only with a CORS rule of the bucket. The broker needs none. */
function putWithProgress(
  signed: Signed,
  body: Blob | FormData,
  onProgress: (event: ProgressEvent) => void,
  onComplete: (etag: string) => void,
  signal?: AbortSignal,
): Promise<{ ETag: string }> {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const failed = (): void => reject(Object.assign(new Error(`S3 answered ${request.status}`), { source: request }));
    const stop = (): void => request.abort();
    request.open(signed.method, signed.url);
    for (const [name, value] of Object.entries(signed.headers)) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", onProgress);
    request.addEventListener("error", failed);
    request.addEventListener("abort", () => reject(new DOMException("aborted", "AbortError")));
    request.addEventListener("load", () => {
      if (request.status !== 200) return failed();
      onComplete("");
      resolve({ ETag: "" });
    });
    request.addEventListener("loadend", () => signal?.removeEventListener("abort", stop));
    signal?.addEventListener("abort", stop);
    request.send(body);
  });
}
