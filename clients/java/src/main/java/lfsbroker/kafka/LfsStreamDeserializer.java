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
 * Makes a stream of every value: of a pointer the bytes that it stands for, of any other record its own. Nothing is
 * fetched before the first read, so {@code poll} stays quick whatever the size.
 *
 * <p>The stream is verified while it is read. Its last bytes come only when everything before them is proved;
 * bytes that are not the promised ones end it with {@link LfsException.Integrity}, a broken connection with an
 * {@code IOException}.
 */
public final class LfsStreamDeserializer implements Deserializer<InputStream> {
    private static final Logger LOG = LoggerFactory.getLogger(LfsStreamDeserializer.class);
    /** How long a read may stand still. */
    private static final Duration PATIENCE = Duration.ofSeconds(60);

    private Source source;
    /** Whether it was said that a pointer came without a checksum. */
    private boolean told;

    @Override
    public void configure(Map<String, ?> settings, boolean isKey) {
        if (isKey) {
            throw new ConfigException("lfs-broker carries values: a key stays what it is");
        }
        String advice = advice(settings);
        if (advice != null) {
            LOG.warn(advice);
        }
        source = new LfsConfig(settings).source();
    }

    /** What is wrong with the consumer's own settings, or null. They are read already and cannot be changed from here. */
    static String advice(Map<String, ?> settings) {
        Object level = settings.get(ConsumerConfig.ISOLATION_LEVEL_CONFIG);
        if (level != null && level.toString().equalsIgnoreCase("read_committed")) {
            return null;
        }
        return "isolation.level is " + (level == null ? "read_uncommitted (the default)" : level)
                + ": a pointer may be seen twice, or although its transaction was aborted; set isolation.level=read_committed";
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
        return follow(Pointer.parse(value), topic, headers);
    }

    /** That a pointer has no checksum, for the first one that has none; else null. */
    String advice(Pointer pointer) {
        if (told || !pointer.checksum().algorithm().equals("none")) {
            return null;
        }
        told = true;
        return pointer + " has no checksum: of its bytes, and of those of others like it, only the size is verified";
    }

    InputStream follow(Pointer pointer, String topic, Headers headers) {
        String advice = advice(pointer);
        if (advice != null) {
            LOG.warn(advice);
        }
        Header version = headers == null ? null : headers.lastHeader("lfs-version-id");
        boolean none = version == null || version.value() == null;
        String versionId = none ? null : new String(version.value(), StandardCharsets.UTF_8);
        return new VerifiedStream(pointer, source.boundTo(topic), versionId, PATIENCE);
    }

    @Override
    public void close() {
        if (source != null) {
            source.close();
        }
    }
}
