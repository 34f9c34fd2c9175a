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

/** The settings: they stand among a producer's or consumer's own and begin with {@code lfs.}. */
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

    /** What a record has beside its value: key, headers, framing. */
    private static final long RECORD_OVERHEAD = 64 << 10;

    private static final long REQUEST_SIZE_DEFAULT = 1 << 20;

    private static final ConfigDef DEFINITION = new ConfigDef()
            .define(BROKER_URL, Type.STRING, null, Importance.HIGH, "Where the broker is.")
            .define(TOKEN, Type.PASSWORD, null, Importance.MEDIUM, "The bearer token.")
            .define(TOKEN_FILE, Type.STRING, null, Importance.MEDIUM, "A file with the bearer token, read for each request.")
            .define(
                    VALUE_SERIALIZER,
                    Type.CLASS,
                    "org.apache.kafka.common.serialization.ByteArraySerializer",
                    Importance.HIGH,
                    "What makes bytes of the application's values.")
            .define(
                    VALUE_DESERIALIZER,
                    Type.CLASS,
                    "org.apache.kafka.common.serialization.ByteArrayDeserializer",
                    Importance.HIGH,
                    "What makes values of bytes.")
            .define(
                    MIN_BYTES,
                    Type.LONG,
                    null,
                    Importance.MEDIUM,
                    "Values of at least so many bytes go through the broker. Default: min_bytes of the staging topic's policy,"
                            + " or less where the producer's max.request.size would refuse such a value inline.")
            .define(
                    MAX_BYTES,
                    Type.LONG,
                    256L << 20,
                    Range.between(0, Integer.MAX_VALUE - 8),
                    Importance.MEDIUM,
                    "The largest value that is read into memory.")
            .define(
                    STAGING_TOPIC,
                    Type.STRING,
                    "{topic}.lfs-staging",
                    Importance.MEDIUM,
                    "The topic that the broker publishes its own pointers to; {topic} is the record's.")
            .define(TIMEOUT_MS, Type.LONG, 300_000L, Range.atLeast(1), Importance.LOW, "How long the broker may read back a value that was sent.")
            .define(S3_BUCKETS, Type.LIST, List.of(), Importance.HIGH, "Read these buckets with own credentials, without the broker.")
            .define(S3_ENDPOINT, Type.STRING, null, Importance.LOW, "S3's endpoint where it is not AWS.")
            .define(S3_REGION, Type.STRING, null, Importance.LOW, "The region; else the one of the AWS environment.")
            .define(S3_PATH_STYLE, Type.BOOLEAN, null, Importance.LOW, "Path-style addresses; true where an endpoint is set.")
            .define(S3_ACCESS_KEY_ID, Type.STRING, null, Importance.LOW, "The access key; else the AWS environment's credentials.")
            .define(S3_SECRET_ACCESS_KEY, Type.PASSWORD, null, Importance.LOW, "Its secret.");

    /** Goes into a header as it is; what else a file may begin or end with (a mark of its encoding, a second line) does not. */
    private static final Pattern TOKEN_TEXT = Pattern.compile("[\\x21-\\x7e]+");

    /** After the place where it was looked for. What is there instead is not quoted: it may be a token and a bit. */
    private static final String NO_TOKEN = " holds no bearer token: it is one line of visible ASCII, without a byte order mark";

    private final long largestInline;

    LfsConfig(Map<String, ?> settings) {
        super(DEFINITION, settings, false);
        largestInline = largestInline(originals().get("max.request.size"));
        Password token = getPassword(TOKEN);
        if (token != null && !isSendable(token.value())) {
            throw new ConfigException(TOKEN + NO_TOKEN);
        }
    }

    URI brokerUrl() {
        String url = getString(BROKER_URL);
        if (url == null || !url.matches("https?://.+")) {
            throw new ConfigException(BROKER_URL, url, "the address of lfs-broker is needed");
        }
        return URI.create(url.replaceFirst("/+$", ""));
    }

    /** The bearer token as it is now, or null. */
    String token() {
        Password token = getPassword(TOKEN);
        String file = getString(TOKEN_FILE);
        if (token != null || file == null) {
            return token == null ? null : token.value();
        }
        try {
            String held = Files.readString(Path.of(file)).strip();
            if (!isSendable(held)) {
                // The file may be in the middle of its renewal.
                throw new LfsException.Unavailable(file + NO_TOKEN, null);
            }
            return held;
        } catch (IOException error) {
            throw new LfsException.Unavailable("the token file cannot be read: " + error.getMessage(), error);
        }
    }

    /** Checked here, because the JDK's HTTP client would quote the whole token in its complaint. */
    private static boolean isSendable(String token) {
        return TOKEN_TEXT.matcher(token).matches();
    }

    /** What the application set, or null. */
    Long minBytes() {
        return getLong(MIN_BYTES);
    }

    /** From so many bytes on the producer may refuse to send a value inline. */
    long largestInline() {
        return largestInline;
    }

    private static long largestInline(Object request) {
        try {
            long most = request == null ? REQUEST_SIZE_DEFAULT : Long.parseLong(request.toString().trim());
            return Math.max(0, most - RECORD_OVERHEAD);
        } catch (NumberFormatException error) {
            throw new ConfigException("max.request.size", request, "not a number");
        }
    }

    String stagingTopic(String topic) {
        return getString(STAGING_TOPIC).replace("{topic}", topic);
    }

    Duration timeout() {
        return Duration.ofMillis(getLong(TIMEOUT_MS));
    }

    /** Where a consumer gets the bytes from. */
    Source source() {
        return getList(S3_BUCKETS).isEmpty() ? new BrokerSource(new Broker(this), this::stagingTopic) : new S3Source(this);
    }
}
