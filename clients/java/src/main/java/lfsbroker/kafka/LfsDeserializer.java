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
 * Downloads and verifies the object of each pointer, and passes its bytes to the application's own deserializer
 * ({@code lfs.value.deserializer}; by default the value stays a byte array). Passes the values of other records unchanged.
 *
 * @param <T> the type that the application's own deserializer returns
 */
public final class LfsDeserializer<T> implements Deserializer<T> {
    private static final Logger LOG = LoggerFactory.getLogger(LfsDeserializer.class);
    /** How often a download is tried in all, if its connection breaks. */
    private static final int MAX_DOWNLOAD_ATTEMPTS = 3;

    private final LfsStreamDeserializer streamDeserializer = new LfsStreamDeserializer();
    private Deserializer<T> inner;
    private long maxBytes;

    @Override
    @SuppressWarnings("unchecked")
    public void configure(Map<String, ?> settings, boolean isKey) {
        LfsConfig config = new LfsConfig(settings);
        streamDeserializer.configure(settings, isKey);
        inner = config.getConfiguredInstance(LfsConfig.VALUE_DESERIALIZER, Deserializer.class);
        inner.configure(settings, false);
        maxBytes = config.getLong(LfsConfig.MAX_BYTES);
        String warning = heapWarning(settings, maxBytes, Runtime.getRuntime().maxMemory());
        if (warning != null) {
            LOG.warn(warning);
        }
    }

    /** A warning if the values of one poll may need more memory than the heap has; otherwise null. */
    static String heapWarning(Map<String, ?> settings, long maxBytes, long heapBytes) {
        Object configured = settings.get(ConsumerConfig.MAX_POLL_RECORDS_CONFIG);
        long records = configured == null ? ConsumerConfig.DEFAULT_MAX_POLL_RECORDS : Long.parseLong(configured.toString().trim());
        if (records * maxBytes <= heapBytes) {
            return null;
        }
        return "one poll may read " + records + " records (max.poll.records) of up to " + maxBytes
                + " bytes each (lfs.max.bytes), but the heap has only " + heapBytes
                + " bytes: lower max.poll.records or lfs.max.bytes, or use LfsStreamDeserializer";
    }

    @Override
    public T deserialize(String topic, byte[] value) {
        return inner.deserialize(topic, resolve(topic, null, value));
    }

    @Override
    public T deserialize(String topic, Headers headers, byte[] value) {
        return inner.deserialize(topic, headers, resolve(topic, headers, value));
    }

    private byte[] resolve(String topic, Headers headers, byte[] value) {
        if (value == null || !Pointer.looksLike(value)) {
            return value;
        }
        Pointer pointer = Pointer.parse(value);
        if (pointer.size() > maxBytes) {
            throw new LfsException.TooLarge(pointer.size(), maxBytes);
        }
        for (int attempt = 1; ; attempt++) {
            try (InputStream stream = streamDeserializer.streamOf(pointer, topic, headers)) {
                return readFully(stream, (int) pointer.size());
            } catch (IOException error) {
                if (attempt == MAX_DOWNLOAD_ATTEMPTS) {
                    throw new LfsException.Unavailable("the object " + pointer + " could not be downloaded (" + attempt + " attempts): "
                            + error.getMessage(), error);
                }
            }
        }
    }

    /** Reads to the end, because the stream has verified all bytes only there. */
    private static byte[] readFully(InputStream stream, int size) throws IOException {
        byte[] bytes = new byte[size];
        stream.readNBytes(bytes, 0, size);
        if (stream.read() != -1) {
            throw new IllegalStateException("a verified stream has exactly the bytes of its pointer's size");
        }
        return bytes;
    }

    @Override
    public void close() {
        streamDeserializer.close();
        if (inner != null) {
            inner.close();
        }
    }
}
