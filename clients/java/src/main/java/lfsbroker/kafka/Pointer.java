package lfsbroker.kafka;

import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.DeserializationFeature;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;

/** The small JSON value of the Kafka record that refers to the bytes in S3: KafScale's envelope, version 1. */
record Pointer(String bucket, String key, long size, Checksum checksum, byte[] json) {
    /** The first bytes of the value, in which a reader expects the marker member. */
    private static final int MARKER_WINDOW_BYTES = 50;

    private static final ObjectMapper MAPPER =
            new ObjectMapper().enable(DeserializationFeature.FAIL_ON_TRAILING_TOKENS);

    /** Whether a record's value is a pointer and not data, by KafScale's published rule. */
    static boolean looksLike(byte[] value) {
        if (value.length == 0 || value[0] != '{') {
            return false;
        }
        String window = new String(value, 0, Math.min(value.length, MARKER_WINDOW_BYTES), StandardCharsets.ISO_8859_1);
        return window.contains("\"kfs_lfs\"");
    }

    /** Parses a record's value that looks like a pointer. Unknown members are ignored. */
    static Pointer parse(byte[] value) {
        JsonNode json;
        try {
            json = MAPPER.readTree(value);
        } catch (JsonProcessingException error) {
            throw new LfsException.Malformed("the pointer is malformed: " + error.getOriginalMessage());
        } catch (IOException error) {
            throw new LfsException.Malformed("the pointer is malformed: " + error.getMessage());
        }
        JsonNode version = json.path("kfs_lfs");
        // Jackson's lenient conversions would also turn "1", 1.5, true and 4294967297 into 1.
        if (!version.isIntegralNumber() || !version.canConvertToInt() || version.intValue() != 1) {
            throw new LfsException.Malformed("the pointer has version " + version + ", but this client supports only version 1");
        }
        JsonNode size = json.path("size");
        if (size.isMissingNode() || size.isNull()) {
            throw new LfsException.Malformed("the pointer has no size");
        }
        if (!size.isIntegralNumber() || !size.canConvertToLong() || size.longValue() < 0) {
            throw new LfsException.Malformed("the pointer is malformed: size must be a whole number from 0 to 2^63-1");
        }
        Checksum checksum = Checksum.of(text(json, "sha256"), text(json, "checksum_alg"), text(json, "checksum"));
        return new Pointer(requiredText(json, "bucket"), requiredText(json, "key"), size.longValue(), checksum, value);
    }

    /** The member's text, or null if the member is missing, null or empty. */
    private static String text(JsonNode json, String name) {
        JsonNode member = json.path(name);
        if (member.isMissingNode() || member.isNull()) {
            return null;
        }
        if (!member.isTextual()) {
            throw new LfsException.Malformed("the pointer is malformed: " + name + " must be a string");
        }
        return member.textValue().isEmpty() ? null : member.textValue();
    }

    private static String requiredText(JsonNode json, String name) {
        String text = text(json, name);
        if (text == null) {
            throw new LfsException.Malformed("the pointer has no " + name);
        }
        return text;
    }

    @Override
    public boolean equals(Object other) {
        return other instanceof Pointer pointer && Arrays.equals(json, pointer.json);
    }

    @Override
    public int hashCode() {
        return Arrays.hashCode(json);
    }

    @Override
    public String toString() {
        return bucket + "/" + key;
    }
}
