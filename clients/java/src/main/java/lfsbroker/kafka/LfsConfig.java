package lfsbroker.kafka;

import java.io.IOException;
import java.net.URI;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;
import org.apache.kafka.common.config.AbstractConfig;
import org.apache.kafka.common.config.ConfigDef;
import org.apache.kafka.common.config.ConfigDef.Importance;
import org.apache.kafka.common.config.ConfigDef.Range;
import org.apache.kafka.common.config.ConfigDef.Type;
import org.apache.kafka.common.config.ConfigException;
import org.apache.kafka.common.config.types.Password;

/** The settings of this module. They are part of a producer's or consumer's configuration and begin with {@code lfs.}. */
public final class LfsConfig extends AbstractConfig {
    public static final String BROKER_URL = "lfs.broker.url";
    public static final String TOKEN = "lfs.broker.token";
    public static final String TOKEN_FILE = "lfs.broker.token.file";
    public static final String VALUE_SERIALIZER = "lfs.value.serializer";
    public static final String VALUE_DESERIALIZER = "lfs.value.deserializer";
    public static final String MIN_BYTES = "lfs.min.bytes";
    public static final String MAX_BYTES = "lfs.max.bytes";
    public static final String STAGING_TOPIC = "lfs.staging.topic";
    public static final String TIMEOUT_MS = "lfs.timeout.ms";
    public static final String S3_BUCKETS = "lfs.s3.buckets";
    public static final String S3_ENDPOINT = "lfs.s3.endpoint";
    public static final String S3_REGION = "lfs.s3.region";
    public static final String S3_PATH_STYLE = "lfs.s3.path.style";
    public static final String S3_ACCESS_KEY_ID = "lfs.s3.access.key.id";
    public static final String S3_SECRET_ACCESS_KEY = "lfs.s3.secret.access.key";

    /** Reserved for the parts of a record besides its value: key, headers, framing. */
    private static final long RECORD_OVERHEAD_BYTES = 64 << 10;

    private static final long DEFAULT_MAX_REQUEST_BYTES = 1 << 20;

    private static final ConfigDef DEFINITION = new ConfigDef()
            .define(BROKER_URL, Type.STRING, null, Importance.HIGH, "The URL of lfs-broker.")
            .define(TOKEN, Type.PASSWORD, null, Importance.MEDIUM, "The bearer token.")
            .define(TOKEN_FILE, Type.STRING, null, Importance.MEDIUM, "A file with the bearer token. It is read for each request.")
            .define(
                    VALUE_SERIALIZER,
                    Type.CLASS,
                    "org.apache.kafka.common.serialization.ByteArraySerializer",
                    Importance.HIGH,
                    "The application's own serializer.")
            .define(
                    VALUE_DESERIALIZER,
                    Type.CLASS,
                    "org.apache.kafka.common.serialization.ByteArrayDeserializer",
                    Importance.HIGH,
                    "The application's own deserializer.")
            .define(
                    MIN_BYTES,
                    Type.LONG,
                    null,
                    Importance.MEDIUM,
                    "Values of at least this size are uploaded through the broker. Default: min_bytes of the staging topic's policy,"
                            + " but at most the size that the producer's max.request.size allows inline.")
            .define(
                    MAX_BYTES,
                    Type.LONG,
                    256L << 20,
                    Range.between(0, Integer.MAX_VALUE - 8),
                    Importance.MEDIUM,
                    "The largest value in bytes that is read into memory.")
            .define(
                    STAGING_TOPIC,
                    Type.STRING,
                    "{topic}.lfs-staging",
                    Importance.MEDIUM,
                    "The topic to which the broker publishes its own pointers. {topic} stands for the record's topic.")
            .define(
                    TIMEOUT_MS,
                    Type.LONG,
                    300_000L,
                    Range.atLeast(1),
                    Importance.LOW,
                    "How long the broker may take to verify an upload, in milliseconds.")
            .define(
                    S3_BUCKETS,
                    Type.LIST,
                    List.of(),
                    Importance.HIGH,
                    "Read these buckets with the consumer's own S3 credentials, without the broker.")
            .define(S3_ENDPOINT, Type.STRING, null, Importance.LOW, "The S3 endpoint, if it is not AWS.")
            .define(S3_REGION, Type.STRING, null, Importance.LOW, "The S3 region. Default: from the AWS environment.")
            .define(S3_PATH_STYLE, Type.BOOLEAN, null, Importance.LOW, "Path-style URLs. Default: true if an endpoint is set.")
            .define(S3_ACCESS_KEY_ID, Type.STRING, null, Importance.LOW, "The access key id. Default: from the AWS environment.")
            .define(S3_SECRET_ACCESS_KEY, Type.PASSWORD, null, Importance.LOW, "The secret access key.");

    /** The characters that a header can carry. Excludes a byte order mark and line ends, which a token file may contain. */
    private static final Pattern TOKEN_PATTERN = Pattern.compile("[\\x21-\\x7e]+");

    /** Follows the name of the setting or file. The content is not quoted, because it may contain the token. */
    private static final String INVALID_TOKEN =
            " has no valid bearer token: a token must be one line of visible ASCII characters, without a byte order mark";

    private final long inlineLimitBytes;

    LfsConfig(Map<String, ?> settings) {
        super(DEFINITION, settings, false);
        inlineLimitBytes = inlineLimitBytes(originals().get("max.request.size"));
        Password token = getPassword(TOKEN);
        if (token != null && !isValidToken(token.value())) {
            throw new ConfigException(TOKEN + INVALID_TOKEN);
        }
    }

    URI brokerUrl() {
        String url = getString(BROKER_URL);
        if (url == null || !url.matches("https?://.+")) {
            throw new ConfigException(BROKER_URL, url, "must be the http or https URL of lfs-broker");
        }
        return URI.create(url.replaceFirst("/+$", ""));
    }

    /** The current bearer token, or null. */
    String token() {
        Password token = getPassword(TOKEN);
        String file = getString(TOKEN_FILE);
        if (token != null || file == null) {
            return token == null ? null : token.value();
        }
        try {
            String text = Files.readString(Path.of(file)).strip();
            if (!isValidToken(text)) {
                // Unavailable, because a retry may succeed: another process may be rewriting the file now.
                throw new LfsException.Unavailable(file + INVALID_TOKEN, null);
            }
            return text;
        } catch (IOException error) {
            throw new LfsException.Unavailable("the token file " + file + " (" + TOKEN_FILE + ") cannot be read: " + error, error);
        }
    }

    /** Checked here, because the JDK's HTTP client would quote the whole token in its error message. */
    private static boolean isValidToken(String token) {
        return TOKEN_PATTERN.matcher(token).matches();
    }

    /** The configured {@code lfs.min.bytes}, or null. */
    Long minBytes() {
        return getLong(MIN_BYTES);
    }

    /** The producer may reject inline values of this size or more, because of its {@code max.request.size}. */
    long inlineLimitBytes() {
        return inlineLimitBytes;
    }

    private static long inlineLimitBytes(Object maxRequestSize) {
        try {
            long maxRequestBytes =
                    maxRequestSize == null ? DEFAULT_MAX_REQUEST_BYTES : Long.parseLong(maxRequestSize.toString().trim());
            return Math.max(0, maxRequestBytes - RECORD_OVERHEAD_BYTES);
        } catch (NumberFormatException error) {
            throw new ConfigException("max.request.size", maxRequestSize, "must be a number of bytes");
        }
    }

    String stagingTopic(String topic) {
        return getString(STAGING_TOPIC).replace("{topic}", topic);
    }

    Duration timeout() {
        return Duration.ofMillis(getLong(TIMEOUT_MS));
    }

    /** S3 directly if {@code lfs.s3.buckets} is set; otherwise the broker. */
    ObjectSource source() {
        return getList(S3_BUCKETS).isEmpty() ? new BrokerSource(new BrokerClient(this), this::stagingTopic) : new S3Source(this);
    }
}
