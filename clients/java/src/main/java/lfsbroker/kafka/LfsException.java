package lfsbroker.kafka;

import org.apache.kafka.common.errors.SerializationException;

/**
 * Why a value did not make its way. A consumer's {@code poll} wraps it in a {@code RecordDeserializationException}, which
 * says where the record is; a producer's {@code send} throws it as it is.
 */
public class LfsException extends SerializationException {
    private static final long serialVersionUID = 1L;

    LfsException(String message, Throwable cause) {
        super(message, cause);
    }

    /** The bytes are not those that the pointer promises. Reading again does not help. */
    public static final class Integrity extends LfsException {
        private static final long serialVersionUID = 1L;

        Integrity(String message) {
            super(message, null);
        }
    }

    /** The value is larger than {@code lfs.max.bytes}. Nothing of it was read. */
    public static final class TooLarge extends LfsException {
        private static final long serialVersionUID = 1L;

        TooLarge(long size, long limit) {
            super("the value has " + size + " bytes, lfs.max.bytes allows " + limit, null);
        }
    }

    /** The record begins like a pointer but is none that can be followed. Handing it on as data would hide the loss. */
    public static final class Malformed extends LfsException {
        private static final long serialVersionUID = 1L;

        Malformed(String message) {
            super(message, null);
        }
    }

    /** The broker or S3 said no: {@link #code} is one of the broker's, or S3's. */
    public static final class Refused extends LfsException {
        private static final long serialVersionUID = 1L;
        private final String code;

        Refused(String code, String detail) {
            super(code + ": " + detail, null);
            this.code = code;
        }

        /** What it was refused for, to decide by. */
        public String code() {
            return code;
        }
    }

    /** The broker or S3 cannot be reached now. The same again may succeed. */
    public static final class Unavailable extends LfsException {
        private static final long serialVersionUID = 1L;

        Unavailable(String message, Throwable cause) {
            super(message, cause);
        }
    }
}
