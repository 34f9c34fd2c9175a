package lfsbroker.kafka;

import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.Locale;
import java.util.zip.CRC32;
import java.util.zip.CRC32C;

/** The checksum in a pointer: algorithm and hex digest. The algorithm is {@code none} if the pointer has no checksum. */
record Checksum(String algorithm, String hex) {
    /** Computes a digest incrementally. */
    interface Hasher {
        void update(byte[] bytes, int offset, int length);

        String hex();
    }

    /** SHA-256 takes precedence over another checksum, as in every reader of the envelope. */
    static Checksum of(String sha256, String algorithm, String checksum) {
        if (sha256 != null) {
            return parse("sha256", sha256, 64);
        }
        String name = algorithm == null ? "none" : algorithm.toLowerCase(Locale.ROOT);
        if (checksum == null && (name.equals("none") || name.equals("sha256"))) {
            return new Checksum("none", "");
        }
        return switch (name) {
            case "sha256", "none" -> parse("sha256", checksum, 64);
            case "md5" -> parse(name, checksum, 32);
            case "crc64nvme" -> parse(name, checksum, 16);
            case "crc32", "crc32c" -> parse(name, checksum, 8);
            default -> throw new LfsException.Malformed("the pointer is malformed: the checksum_alg " + algorithm
                    + " is unknown; known are sha256, md5, crc32, crc32c, crc64nvme and none");
        };
    }

    private static Checksum parse(String algorithm, String hex, int digits) {
        if (hex == null || !hex.matches("[0-9a-fA-F]{" + digits + "}")) {
            throw new LfsException.Malformed("the pointer is malformed: " + algorithm + " needs " + digits + " hex digits, found "
                    + (hex == null ? "none" : hex.length() + " characters"));
        }
        return new Checksum(algorithm, hex.toLowerCase(Locale.ROOT));
    }

    Hasher hasher() {
        return switch (algorithm) {
            case "sha256" -> messageDigest("SHA-256");
            case "md5" -> messageDigest("MD5");
            case "crc32" -> crc(new CRC32());
            case "crc32c" -> crc(new CRC32C());
            case "crc64nvme" -> new Crc64Nvme();
            default -> noChecksum();
        };
    }

    static String sha256(byte[] bytes, int offset, int length) {
        Hasher hasher = messageDigest("SHA-256");
        hasher.update(bytes, offset, length);
        return hasher.hex();
    }

    private static Hasher messageDigest(String name) {
        MessageDigest digest;
        try {
            digest = MessageDigest.getInstance(name);
        } catch (NoSuchAlgorithmException error) {
            throw new IllegalStateException("every Java platform has " + name, error);
        }
        return new Hasher() {
            @Override
            public void update(byte[] bytes, int offset, int length) {
                digest.update(bytes, offset, length);
            }

            @Override
            public String hex() {
                return HexFormat.of().formatHex(digest.digest());
            }
        };
    }

    private static Hasher crc(java.util.zip.Checksum crc) {
        return new Hasher() {
            @Override
            public void update(byte[] bytes, int offset, int length) {
                crc.update(bytes, offset, length);
            }

            @Override
            public String hex() {
                return HexFormat.of().toHexDigits((int) crc.getValue());
            }
        };
    }

    private static Hasher noChecksum() {
        return new Hasher() {
            @Override
            public void update(byte[] bytes, int offset, int length) {}

            @Override
            public String hex() {
                return "";
            }
        };
    }

    /** CRC-64/NVME: S3 supports it, the JDK does not. */
    private static final class Crc64Nvme implements Hasher {
        private static final long[] TABLE = new long[256];
        private long crc = -1;

        static {
            for (int index = 0; index < TABLE.length; index++) {
                long entry = index;
                for (int bit = 0; bit < 8; bit++) {
                    entry = (entry & 1) == 0 ? entry >>> 1 : (entry >>> 1) ^ 0x9a6c9329ac4bc9b5L;
                }
                TABLE[index] = entry;
            }
        }

        @Override
        public void update(byte[] bytes, int offset, int length) {
            for (int index = offset; index < offset + length; index++) {
                crc = TABLE[(int) (crc ^ bytes[index]) & 0xff] ^ (crc >>> 8);
            }
        }

        @Override
        public String hex() {
            return HexFormat.of().toHexDigits(~crc);
        }
    }
}
