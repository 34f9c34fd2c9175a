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
 * Sends what the application's own serializer makes ({@code lfs.value.serializer}; bytes by default): values of at least
 * {@code lfs.min.bytes}, or as many as the topic's policy advises, through the broker, with their pointer as the record's
 * value, smaller ones inline. A value that would be taken for a pointer is never sent inline: it comes back as it was.
 *
 * <p>The record is the application's own, sent by its producer, in its transaction. The broker publishes a pointer
 * of its own for every upload; it goes to the staging topic, which nobody reads.
 *
 * @param <T> what the application sends
 */
public final class LfsSerializer<T> implements Serializer<T> {
    /** Larger values go up in parts with hashes of their own, so that the broker need not read them back. */
    private static final int SINGLE_BYTES = 64 << 20;

    private static final int PART_BYTES = 16 << 20;
    private static final int WAIT_SECONDS = 10;

    private LfsConfig config;
    private Serializer<T> inner;
    private Broker broker;
    private Threshold threshold;

    @Override
    @SuppressWarnings("unchecked")
    public void configure(Map<String, ?> settings, boolean isKey) {
        if (isKey) {
            throw new ConfigException("lfs-broker carries values: a key stays what it is");
        }
        config = new LfsConfig(settings);
        inner = config.getConfiguredInstance(LfsConfig.VALUE_SERIALIZER, Serializer.class);
        inner.configure(settings, false);
        broker = new Broker(config);
        threshold = new Threshold(config, broker::policy, System::nanoTime);
    }

    @Override
    public byte[] serialize(String topic, T value) {
        return carried(topic, inner.serialize(topic, value));
    }

    @Override
    public byte[] serialize(String topic, Headers headers, T value) {
        return carried(topic, inner.serialize(topic, headers, value));
    }

    private byte[] carried(String topic, byte[] bytes) {
        String staging = config.stagingTopic(topic);
        if (bytes == null || (!Pointer.looksLike(bytes) && bytes.length < threshold.of(staging))) {
            return bytes;
        }
        byte[] promise = promise(staging, bytes);
        String idempotencyKey = UUID.randomUUID().toString();
        JsonNode upload = open(promise, idempotencyKey);
        String path = "/lfs/uploads/" + upload.path("id").asText();
        try {
            if (upload.path("mode").asText().equals("single")) {
                // The same question again gives the same upload, with a new URL.
                broker.put(signed(upload), () -> signed(open(promise, idempotencyKey)), bytes, 0, bytes.length);
            } else {
                putParts(path, upload.path("part_count").asInt(), bytes);
            }
            return pointer(path).toString().getBytes(StandardCharsets.UTF_8);
        } catch (RuntimeException error) {
            abort(path, error);
            throw error;
        }
    }

    private static byte[] promise(String topic, byte[] bytes) {
        ObjectNode request = Broker.MAPPER.createObjectNode();
        request.put("topic", topic).put("size", bytes.length).put("sha256", Checksum.sha256(bytes, 0, bytes.length));
        if (bytes.length > SINGLE_BYTES) {
            ArrayNode hashes = request.put("part_size", PART_BYTES).putArray("part_sha256");
            for (int part = 0; part < parts(bytes.length); part++) {
                int at = part * PART_BYTES;
                hashes.add(Checksum.sha256(bytes, at, Math.min(PART_BYTES, bytes.length - at)));
            }
        }
        return bytes(request);
    }

    /** How many parts a value has: counted, because an offset after the last may be more than an int holds. */
    static int parts(int size) {
        return (int) ((size + (PART_BYTES - 1L)) / PART_BYTES);
    }

    private JsonNode open(byte[] promise, String idempotencyKey) {
        return broker.call("POST", "/lfs/uploads", promise, idempotencyKey);
    }

    private static JsonNode signed(JsonNode upload) {
        if (!upload.has("upload")) {
            throw new LfsException.Refused(upload.path("state").asText("HTTP 200"), "the broker signs nothing for this upload any more");
        }
        return upload.path("upload");
    }

    /** Each part is signed when it is its turn: a URL does not outlive a slow upload. */
    private void putParts(String path, int count, byte[] bytes) {
        for (int number = 1; number <= count; number++) {
            ObjectNode request = Broker.MAPPER.createObjectNode();
            request.putArray("part_numbers").add(number);
            Supplier<JsonNode> sign = () -> part(broker.call("POST", path + "/parts", bytes(request), null));
            JsonNode part = sign.get();
            broker.put(part, sign, bytes, part.path("offset").asInt(), part.path("size").asInt());
        }
    }

    private static JsonNode part(JsonNode answer) {
        if (!answer.path("parts").has(0)) {
            throw new LfsException.Refused("no parts", "the broker signed no part");
        }
        return answer.path("parts").get(0);
    }

    /** Completes, and waits until the bytes are proved: from then on the pointer holds, whatever Kafka does. */
    private JsonNode pointer(String path) {
        long deadline = System.nanoTime() + config.timeout().toNanos();
        JsonNode answer = broker.call("POST", path + "/complete", null, null);
        while (!answer.has("pointer")) {
            String state = answer.path("state").asText();
            if (state.equals("open")) {
                // S3 gave no verdict, or refused: complete again goes on, or says why it cannot.
                answer = broker.call("POST", path + "/complete", null, null);
                state = answer.path("state").asText();
            }
            if (!state.equals("completing") && !answer.has("pointer")) {
                throw new LfsException.Refused(answer.path("error").path("code").asText(state), answer.path("error").path("detail").asText());
            }
            if (System.nanoTime() > deadline) {
                throw new LfsException.Unavailable("the broker still reads the bytes after " + config.timeout(), null);
            }
            answer = broker.call("GET", path + "?wait=" + WAIT_SECONDS, null, null);
        }
        return answer.path("pointer");
    }

    /** What did not become a record leaves nothing behind; where this fails too, or nobody answers anyway, the upload expires. */
    private void abort(String path, RuntimeException error) {
        if (error instanceof LfsException.Unavailable) {
            return;
        }
        try {
            broker.call("DELETE", path, null, null);
        } catch (RuntimeException second) {
            error.addSuppressed(second);
        }
    }

    private static byte[] bytes(JsonNode json) {
        return json.toString().getBytes(StandardCharsets.UTF_8);
    }

    @Override
    public void close() {
        if (inner != null) {
            inner.close();
        }
    }
}
