package lfsbroker.kafka;

import java.io.IOException;
import java.io.InputStream;
import java.util.Map;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.common.header.Headers;
import org.apache.kafka.common.serialization.Deserializer;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * Follows pointers, and hands what they stand for to the application's own deserializer ({@code lfs.value.deserializer};
 * bytes by default). Any other record goes there as it is. The bytes are verified before anybody sees them.
 *
 * @param <T> what the application's own deserializer makes
 */
public final class LfsDeserializer<T> implements Deserializer<T> {
    private static final Logger LOG = LoggerFactory.getLogger(LfsDeserializer.class);
    /** How often a download that broke is begun anew. */
    private static final int ATTEMPTS = 3;

    private final LfsStreamDeserializer streams = new LfsStreamDeserializer();
    private Deserializer<T> inner;
    private long maxBytes;

    @Override
    @SuppressWarnings("unchecked")
    public void configure(Map<String, ?> settings, boolean isKey) {
        LfsConfig config = new LfsConfig(settings);
        streams.configure(settings, isKey);
        inner = config.getConfiguredInstance(LfsConfig.VALUE_DESERIALIZER, Deserializer.class);
        inner.configure(settings, false);
        maxBytes = config.getLong(LfsConfig.MAX_BYTES);
        String advice = advice(settings, maxBytes, Runtime.getRuntime().maxMemory());
        if (advice != null) {
            LOG.warn(advice);
        }
    }

    /** What one poll may come to, where that is more than the heap; else null. */
    static String advice(Map<String, ?> settings, long maxBytes, long heapBytes) {
        Object set = settings.get(ConsumerConfig.MAX_POLL_RECORDS_CONFIG);
        long records = set == null ? ConsumerConfig.DEFAULT_MAX_POLL_RECORDS : Long.parseLong(set.toString().trim());
        if (records * maxBytes <= heapBytes) {
            return null;
        }
        return "one poll may read " + records + " records (max.poll.records) of " + maxBytes + " bytes (lfs.max.bytes), the heap has "
                + heapBytes + ": lower one of them, or take streams (LfsStreamDeserializer)";
    }

    @Override
    public T deserialize(String topic, byte[] value) {
        return inner.deserialize(topic, bytes(topic, null, value));
    }

    @Override
    public T deserialize(String topic, Headers headers, byte[] value) {
        return inner.deserialize(topic, headers, bytes(topic, headers, value));
    }

    private byte[] bytes(String topic, Headers headers, byte[] value) {
        if (value == null || !Pointer.looksLike(value)) {
            return value;
        }
        Pointer pointer = Pointer.parse(value);
        if (pointer.size() > maxBytes) {
            throw new LfsException.TooLarge(pointer.size(), maxBytes);
        }
        for (int attempt = 1; ; attempt++) {
            try (InputStream stream = streams.follow(pointer, topic, headers)) {
                return whole(stream, (int) pointer.size());
            } catch (IOException error) {
                if (attempt == ATTEMPTS) {
                    throw new LfsException.Unavailable(pointer + " could not be read: " + error.getMessage(), error);
                }
            }
        }
    }

    /** Reads to the end, where the stream has proved everything. */
    private static byte[] whole(InputStream stream, int size) throws IOException {
        byte[] bytes = new byte[size];
        stream.readNBytes(bytes, 0, size);
        if (stream.read() != -1) {
            throw new IllegalStateException("a verified stream ends where its pointer says");
        }
        return bytes;
    }

    @Override
    public void close() {
        streams.close();
        if (inner != null) {
            inner.close();
        }
    }
}
