import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.UUID;
import lfsbroker.generated.ApiClient;
import lfsbroker.generated.ApiException;
import lfsbroker.generated.JSON;
import lfsbroker.generated.api.PointersApi;
import lfsbroker.generated.api.UploadsApi;
import lfsbroker.generated.model.*;

/** Uploads through the generated client: one PUT, then parts; reads the state, completes, resolves, compares. */
public final class UploadCheck {
    private static final int PART_SIZE = 5 << 20;

    private final HttpClient s3 = HttpClient.newHttpClient();
    private final UploadsApi uploads;
    private final PointersApi pointers;

    private UploadCheck(ApiClient broker) {
        uploads = new UploadsApi(broker);
        pointers = new PointersApi(broker);
    }

    public static void main(String[] arguments) throws Exception {
        ApiClient broker = new ApiClient().setBasePath(System.getenv("LFS_BROKER_URL")).setReadTimeout(60_000);
        UploadCheck check = new UploadCheck(broker);
        check.single();
        check.parts();
        check.aborted();
        decodeCompleting();
        System.out.println("Java: one PUT and three parts were uploaded, completed, resolved and compared by a generated client");
    }

    private static void check(boolean holds, Object found) {
        if (!holds) {
            throw new AssertionError(found);
        }
    }

    private static String sha256(byte[] value) throws NoSuchAlgorithmException {
        return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(value));
    }

    private void put(String method, String url, Map<String, String> headers, byte[] value) throws IOException, InterruptedException {
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(url)).method(method, BodyPublishers.ofByteArray(value));
        headers.forEach((name, text) -> {
            if (!name.equalsIgnoreCase("content-length")) {
                request.header(name, text);
            }
        });
        int status = s3.send(request.build(), BodyHandlers.discarding()).statusCode();
        check(status == 200, status);
    }

    private byte[] download(Pointer pointer) throws ApiException, IOException, InterruptedException {
        Resolved resolved = pointers.resolvePointer(pointer, null, "sdk-java", null).getResolved();
        check(resolved.getSize().equals(pointer.getSize()), resolved);
        HttpRequest request = HttpRequest.newBuilder(URI.create(resolved.getUrl())).build();
        return s3.send(request, BodyHandlers.ofByteArray()).body();
    }

    /** Completes. If the broker needs more time, waits until the bytes are verified. */
    private Pointer complete(UUID id, CompleteUpload request) throws ApiException {
        Object answer = uploads.completeUpload(id, request).getActualInstance();
        if (answer instanceof Published published) {
            check(published.getRecord().getOffset() >= 0, published);
            return published.getPointer();
        }
        if (answer instanceof Verified verified) {
            return verified.getPointer();
        }
        for (int tries = 0; tries < 6; tries++) {
            Upload upload = uploads.getUpload(id, 10L, null);
            if (upload.getPointer() != null) {
                return upload.getPointer();
            }
        }
        throw new AssertionError(id + " is not verified after a minute");
    }

    private void single() throws Exception {
        byte[] value = "hello from a generated client".getBytes();
        Upload upload = uploads.openUpload(
                new OpenUpload().topic("sdk-java").key("single").size((long) value.length).sha256(sha256(value)).headers(Map.of("a", "b")), null);
        check(upload.getMode() == Mode.SINGLE, upload);
        try {
            uploads.completeUpload(upload.getId(), null);
            throw new AssertionError("completed without bytes");
        } catch (ApiException refused) {
            Problem problem = Problem.fromJson(refused.getResponseBody());
            check(refused.getCode() == 409 && problem.getCode() == ErrorCode.OBJECT_MISSING && problem.getRetryable(), problem);
        }
        SignedRequest signed = upload.getUpload();
        put(signed.getMethod(), signed.getUrl(), signed.getHeaders(), value);
        check(Arrays.equals(value, download(complete(upload.getId(), null))), "other bytes");
    }

    private void put(SignedPart part, byte[] value) throws IOException, InterruptedException {
        int offset = part.getOffset().intValue();
        byte[] piece = Arrays.copyOfRange(value, offset, offset + part.getSize().intValue());
        put(part.getMethod(), part.getUrl(), part.getHeaders(), piece);
    }

    private void parts() throws Exception {
        byte[] value = new byte[2 * PART_SIZE + 17];
        new Random(1).nextBytes(value);
        Upload upload = uploads.openUpload(
                new OpenUpload().topic("sdk-java").key("parts").size((long) value.length).partSize((long) PART_SIZE), null);
        check(upload.getMode() == Mode.MULTIPART && upload.getPartCount() == 3, upload);
        put(upload.getParts().get(0), value);
        // A client that has crashed can ask the broker which parts are missing in S3.
        Upload now = uploads.getUpload(upload.getId(), null, null);
        check(now.getNext() == Next.PARTS && now.getMissingParts().equals(List.of(List.of(2, 3))), now);
        for (SignedPart part : uploads.signParts(upload.getId(), new SignParts().partNumbers(List.of(2, 3))).getParts()) {
            put(part, value);
        }
        Pointer pointer = complete(upload.getId(), new CompleteUpload().sha256(sha256(value)));
        check(Arrays.equals(value, download(pointer)), "other bytes");
    }

    private void aborted() throws Exception {
        Upload upload = uploads.openUpload(new OpenUpload().topic("sdk-java").size(1L).sha256(sha256(new byte[1])), null);
        uploads.abortUpload(upload.getId());
        List<UploadState> steps = uploads.getUploadHistory(upload.getId(), null, null).getItems().stream().map(Transition::getTo).toList();
        check(steps.equals(List.of(UploadState.OPEN, UploadState.ABORTED)), steps);
    }

    /** Decodes the `completing` response, which a fast broker seldom returns. */
    private static void decodeCompleting() {
        String completing = "{\"id\":\"01934d2e-7c00-7000-8000-5f2b8c1d9e3a\",\"state\":\"completing\"}";
        Object answer = JSON.getGson().fromJson(completing, Completed.class).getActualInstance();
        check(answer instanceof Completing, answer);
    }
}
