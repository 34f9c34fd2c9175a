package lfsbroker.kafka;

import org.apache.kafka.common.errors.SerializationException;

/**
 * Why a value could not be sent or read. A consumer's {@code poll} wraps this exception in a
 * {@code RecordDeserializationException}, which names partition and offset. A producer's {@code send} throws it directly.
 */
public class LfsException extends SerializationException {
    private static final long serialVersionUID = 1L;

    LfsException(String message, Throwable cause) {
        super(message, cause);
    }

    /** The bytes do not match the pointer's size or checksum. A retry does not help. */
    public static final class Integrity extends LfsException {
        private static final long serialVersionUID = 1L;

        Integrity(String message) {
            super(message, null);
        }
    }

    /** The object is larger than {@code lfs.max.bytes}. None of its bytes were read. */
    public static final class TooLarge extends LfsException {
        private static final long serialVersionUID = 1L;

        TooLarge(long size, long limit) {
            super("the object has " + size + " bytes, but the limit is " + limit
                    + " bytes; raise lfs.max.bytes or use LfsStreamDeserializer", null);
        }
    }

    /** The value begins like a pointer but is invalid. Returning it as data would hide that the real value is missing. */
    public static final class Malformed extends LfsException {
        private static final long serialVersionUID = 1L;

        Malformed(String message) {
            super(message, null);
        }
    }

    /** The broker or S3 rejected the request. {@link #code} is the broker's or S3's error code. */
    public static final class Refused extends LfsException {
        private static final long serialVersionUID = 1L;
        private final String code;

        Refused(String code, String detail) {
            super(code + ": " + detail, null);
            this.code = code;
        }

        /** The error code, by which an application can decide what to do. */
        public String code() {
            return code;
        }
    }

    /** The broker or S3 cannot be reached now, or did not finish in time. A retry may succeed. */
    public static final class Unavailable extends LfsException {
        private static final long serialVersionUID = 1L;

        Unavailable(String message, Throwable cause) {
            super(message, cause);
        }
    }
}
