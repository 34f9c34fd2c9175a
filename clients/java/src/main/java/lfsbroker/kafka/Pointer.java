package lfsbroker.kafka;

import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.DeserializationFeature;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;

/** The small JSON value that stands for the bytes in S3: KafScale's envelope, version 1. */
record Pointer(String bucket, String key, long size, Checksum checksum, byte[] json) {
    /** How far into the value a reader looks for the marker. */
    private static final int WINDOW = 50;

    private static final ObjectMapper MAPPER =
            new ObjectMapper().enable(DeserializationFeature.FAIL_ON_TRAILING_TOKENS);

    /** Whether a record's value is a pointer rather than data: the envelope's published rule. */
    static boolean looksLike(byte[] value) {
        if (value.length == 0 || value[0] != '{') {
            return false;
        }
        String window = new String(value, 0, Math.min(value.length, WINDOW), StandardCharsets.ISO_8859_1);
        return window.contains("\"kfs_lfs\"");
    }

    /** Reads a record's value that looks like a pointer. Members that are not ours are passed over. */
    static Pointer parse(byte[] value) {
        JsonNode json;
        try {
            json = MAPPER.readTree(value);
        } catch (JsonProcessingException error) {
            throw new LfsException.Malformed("the pointer cannot be read: " + error.getOriginalMessage());
        } catch (IOException error) {
            throw new LfsException.Malformed("the pointer cannot be read: " + error.getMessage());
        }
        JsonNode version = json.path("kfs_lfs");
        // Read loosely, "1", 1.5, true and 4294967297 would be 1 as well.
        if (!version.isIntegralNumber() || !version.canConvertToInt() || version.intValue() != 1) {
            throw new LfsException.Malformed("the pointer has version " + version + ", this reader knows 1");
        }
        JsonNode size = json.path("size");
        if (!size.isIntegralNumber() || !size.canConvertToLong() || size.longValue() < 0) {
            throw new LfsException.Malformed("the pointer has no size");
        }
        Checksum checksum = Checksum.of(text(json, "sha256"), text(json, "checksum_alg"), text(json, "checksum"));
        return new Pointer(filled(json, "bucket"), filled(json, "key"), size.longValue(), checksum, value);
    }

    private static String text(JsonNode json, String name) {
        JsonNode member = json.path(name);
        if (member.isMissingNode() || member.isNull()) {
            return null;
        }
        if (!member.isTextual()) {
            throw new LfsException.Malformed("the pointer's " + name + " is no text");
        }
        return member.textValue().isEmpty() ? null : member.textValue();
    }

    private static String filled(JsonNode json, String name) {
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
