package lfsbroker.kafka;

import java.io.ByteArrayInputStream;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Map;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.common.config.ConfigException;
import org.apache.kafka.common.header.Header;
import org.apache.kafka.common.header.Headers;
import org.apache.kafka.common.serialization.Deserializer;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * Returns a stream for each value: for a pointer a stream of the object's bytes, for another record a stream of its value.
 * Nothing is fetched before the first read, so the size of objects does not slow down {@code poll}.
 *
 * <p>The stream is verified while it is read. It returns its last bytes only after all bytes are verified. Corrupt bytes end
 * it with {@link LfsException.Integrity}, a broken connection with an {@code IOException}.
 */
public final class LfsStreamDeserializer implements Deserializer<InputStream> {
    private static final Logger LOG = LoggerFactory.getLogger(LfsStreamDeserializer.class);
    /** How long one read may wait for bytes. */
    private static final Duration READ_TIMEOUT = Duration.ofSeconds(60);

    private ObjectSource source;
    /** Whether the warning about pointers without a checksum was already logged. */
    private boolean warnedOfMissingChecksum;

    @Override
    public void configure(Map<String, ?> settings, boolean isKey) {
        if (isKey) {
            throw new ConfigException(
                    "this deserializer reads values only: set it as value.deserializer, not as key.deserializer");
        }
        String warning = isolationWarning(settings);
        if (warning != null) {
            LOG.warn(warning);
        }
        source = new LfsConfig(settings).source();
    }

    /** A warning about the consumer's isolation level, or null. A deserializer cannot change the consumer's settings. */
    static String isolationWarning(Map<String, ?> settings) {
        Object level = settings.get(ConsumerConfig.ISOLATION_LEVEL_CONFIG);
        if (level != null && level.toString().equalsIgnoreCase("read_committed")) {
            return null;
        }
        return "isolation.level is " + (level == null ? "read_uncommitted (the default)" : level)
                + ": the consumer may see a pointer twice, or a pointer of an aborted transaction; set isolation.level=read_committed";
    }

    @Override
    public InputStream deserialize(String topic, byte[] value) {
        return deserialize(topic, null, value);
    }

    @Override
    public InputStream deserialize(String topic, Headers headers, byte[] value) {
        if (value == null) {
            return null;
        }
        if (!Pointer.looksLike(value)) {
            return new ByteArrayInputStream(value);
        }
        return streamOf(Pointer.parse(value), topic, headers);
    }

    /** A warning for the first pointer that has no checksum; otherwise null. */
    String missingChecksumWarning(Pointer pointer) {
        if (warnedOfMissingChecksum || !pointer.checksum().algorithm().equals("none")) {
            return null;
        }
        warnedOfMissingChecksum = true;
        return pointer + " has no checksum, so only the size of its bytes is verified; the log names only the first such pointer";
    }

    InputStream streamOf(Pointer pointer, String topic, Headers headers) {
        String warning = missingChecksumWarning(pointer);
        if (warning != null) {
            LOG.warn(warning);
        }
        Header version = headers == null ? null : headers.lastHeader("lfs-version-id");
        boolean absent = version == null || version.value() == null;
        String versionId = absent ? null : new String(version.value(), StandardCharsets.UTF_8);
        return new VerifiedStream(pointer, source.forTopic(topic), versionId, READ_TIMEOUT);
    }

    @Override
    public void close() {
        if (source != null) {
            source.close();
        }
    }
}
