package lfsbroker.kafka;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import java.util.UUID;
import java.util.function.Supplier;
import org.apache.kafka.common.config.ConfigException;
import org.apache.kafka.common.header.Headers;
import org.apache.kafka.common.serialization.Serializer;

/**
 * Serializes with the application's own serializer ({@code lfs.value.serializer}; byte arrays by default). Uploads values of
 * at least {@code lfs.min.bytes}, or the topic's policy's {@code min_bytes}, and returns their pointer as the record's value.
 * Smaller values stay inline. A value that looks like a pointer is always uploaded, so that consumers get it back unchanged.
 *
 * <p>The application's producer sends the record, in the application's transaction. The broker also publishes its own
 * pointer for each upload. That pointer goes to the staging topic, which no consumer needs to read.
 *
 * @param <T> the type of the application's values
 */
public final class LfsSerializer<T> implements Serializer<T> {
    /** Larger values are uploaded in parts with a SHA-256 each, so that the broker need not read the object to verify it. */
    private static final int MAX_SINGLE_PUT_BYTES = 64 << 20;

    private static final int PART_SIZE_BYTES = 16 << 20;
    private static final int LONG_POLL_SECONDS = 10;

    private LfsConfig config;
    private Serializer<T> inner;
    private BrokerClient broker;
    private UploadThreshold threshold;

    @Override
    @SuppressWarnings("unchecked")
    public void configure(Map<String, ?> settings, boolean isKey) {
        if (isKey) {
            throw new ConfigException("LfsSerializer sends values only: set it as value.serializer, not as key.serializer");
        }
        config = new LfsConfig(settings);
        inner = config.getConfiguredInstance(LfsConfig.VALUE_SERIALIZER, Serializer.class);
        inner.configure(settings, false);
        broker = new BrokerClient(config);
        threshold = new UploadThreshold(config, broker::policy, System::nanoTime);
    }

    @Override
    public byte[] serialize(String topic, T value) {
        return uploadIfLarge(topic, inner.serialize(topic, value));
    }

    @Override
    public byte[] serialize(String topic, Headers headers, T value) {
        return uploadIfLarge(topic, inner.serialize(topic, headers, value));
    }

    private byte[] uploadIfLarge(String topic, byte[] bytes) {
        String stagingTopic = config.stagingTopic(topic);
        if (bytes == null || (!Pointer.looksLike(bytes) && bytes.length < threshold.minBytes(stagingTopic))) {
            return bytes;
        }
        byte[] openRequest = openRequest(stagingTopic, bytes);
        String idempotencyKey = UUID.randomUUID().toString();
        JsonNode upload = open(openRequest, idempotencyKey);
        String path = "/lfs/uploads/" + upload.path("id").asText();
        try {
            if (upload.path("mode").asText().equals("single")) {
                // The same request with the same idempotency key returns the same upload, with a new URL.
                broker.put(presignedPut(upload), () -> presignedPut(open(openRequest, idempotencyKey)), bytes, 0, bytes.length);
            } else {
                putParts(path, upload.path("part_count").asInt(), bytes);
            }
            return completeAndWait(path).toString().getBytes(StandardCharsets.UTF_8);
        } catch (RuntimeException error) {
            abort(path, error);
            throw error;
        }
    }

    private static byte[] openRequest(String topic, byte[] bytes) {
        ObjectNode request = BrokerClient.MAPPER.createObjectNode();
        request.put("topic", topic).put("size", bytes.length).put("sha256", Checksum.sha256(bytes, 0, bytes.length));
        if (bytes.length > MAX_SINGLE_PUT_BYTES) {
            ArrayNode hashes = request.put("part_size", PART_SIZE_BYTES).putArray("part_sha256");
            for (int part = 0; part < partCount(bytes.length); part++) {
                int offset = part * PART_SIZE_BYTES;
                hashes.add(Checksum.sha256(bytes, offset, Math.min(PART_SIZE_BYTES, bytes.length - offset)));
            }
        }
        return toBytes(request);
    }

    /** The number of parts of a value. Computed with long, because the offset after the last part may exceed an int. */
    static int partCount(int size) {
        return (int) ((size + (PART_SIZE_BYTES - 1L)) / PART_SIZE_BYTES);
    }

    private JsonNode open(byte[] openRequest, String idempotencyKey) {
        return broker.call("POST", "/lfs/uploads", openRequest, idempotencyKey);
    }

    private static JsonNode presignedPut(JsonNode upload) {
        if (!upload.has("upload")) {
            throw new LfsException.Refused(upload.path("state").asText("HTTP 200"),
                    "the upload is not open any more, so the broker returned no presigned URL; send the record again");
        }
        return upload.path("upload");
    }

    /** Requests the URL of each part just before its PUT, because a URL may expire during a slow upload. */
    private void putParts(String path, int count, byte[] bytes) {
        for (int number = 1; number <= count; number++) {
            ObjectNode request = BrokerClient.MAPPER.createObjectNode();
            request.putArray("part_numbers").add(number);
            Supplier<JsonNode> presign = () -> firstPart(broker.call("POST", path + "/parts", toBytes(request), null));
            JsonNode part = presign.get();
            broker.put(part, presign, bytes, part.path("offset").asInt(), part.path("size").asInt());
        }
    }

    private static JsonNode firstPart(JsonNode response) {
        if (!response.path("parts").has(0)) {
            throw new LfsException.Refused("no parts", "the broker returned no presigned URL for the part; send the record again");
        }
        return response.path("parts").get(0);
    }

    /** Completes the upload and waits until the broker has verified it. Then the pointer is valid, even if Kafka is down. */
    private JsonNode completeAndWait(String path) {
        long deadline = System.nanoTime() + config.timeout().toNanos();
        JsonNode response = broker.call("POST", path + "/complete", null, null);
        while (!response.has("pointer")) {
            String state = response.path("state").asText();
            if (state.equals("open")) {
                // The completion failed, for example because S3 was unreachable. Complete again retries it or returns the error.
                response = broker.call("POST", path + "/complete", null, null);
                state = response.path("state").asText();
            }
            if (!state.equals("completing") && !response.has("pointer")) {
                JsonNode error = response.path("error");
                throw new LfsException.Refused(error.path("code").asText(state), error.path("detail").asText());
            }
            if (System.nanoTime() > deadline) {
                throw new LfsException.Unavailable("the upload " + path + " is still being verified after "
                        + config.timeout().toMillis() + " ms; send the record again, or raise " + LfsConfig.TIMEOUT_MS, null);
            }
            response = broker.call("GET", path + "?wait=" + LONG_POLL_SECONDS, null, null);
        }
        return response.path("pointer");
    }

    /** Aborts an upload that does not become a record. If the broker cannot be reached, the upload expires by itself. */
    private void abort(String path, RuntimeException error) {
        if (error instanceof LfsException.Unavailable) {
            return;
        }
        try {
            broker.call("DELETE", path, null, null);
        } catch (RuntimeException abortError) {
            error.addSuppressed(abortError);
        }
    }

    private static byte[] toBytes(JsonNode json) {
        return json.toString().getBytes(StandardCharsets.UTF_8);
    }

    @Override
    public void close() {
        if (inner != null) {
            inner.close();
        }
    }
}
