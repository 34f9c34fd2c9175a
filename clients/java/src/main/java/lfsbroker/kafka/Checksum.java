package lfsbroker.kafka;

import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.Locale;
import java.util.zip.CRC32;
import java.util.zip.CRC32C;

/** What a pointer says of the bytes: an algorithm and its digest in hex; {@code none} where it says nothing. */
record Checksum(String algorithm, String hex) {
    /** Takes in bytes, and at the end has their digest. */
    interface Hasher {
        void update(byte[] bytes, int offset, int length);

        String hex();
    }

    /** SHA-256 stands above another checksum, as in every reader of the envelope. */
    static Checksum of(String sha256, String algorithm, String checksum) {
        if (sha256 != null) {
            return checked("sha256", sha256, 64);
        }
        String name = algorithm == null ? "none" : algorithm.toLowerCase(Locale.ROOT);
        if (checksum == null && (name.equals("none") || name.equals("sha256"))) {
            return new Checksum("none", "");
        }
        return switch (name) {
            case "sha256", "none" -> checked("sha256", checksum, 64);
            case "md5" -> checked(name, checksum, 32);
            case "crc64nvme" -> checked(name, checksum, 16);
            case "crc32", "crc32c" -> checked(name, checksum, 8);
            default -> throw new LfsException.Malformed("the pointer has an unknown checksum_alg: " + algorithm);
        };
    }

    private static Checksum checked(String algorithm, String hex, int length) {
        if (hex == null || !hex.matches("[0-9a-fA-F]{" + length + "}")) {
            throw new LfsException.Malformed("the pointer's " + algorithm + " is not " + length + " hex digits");
        }
        return new Checksum(algorithm, hex.toLowerCase(Locale.ROOT));
    }

    /** A hasher of this algorithm. */
    Hasher hasher() {
        return switch (algorithm) {
            case "sha256" -> digest("SHA-256");
            case "md5" -> digest("MD5");
            case "crc32" -> crc(new CRC32());
            case "crc32c" -> crc(new CRC32C());
            case "crc64nvme" -> new Crc64Nvme();
            default -> nothing();
        };
    }

    static String sha256(byte[] bytes, int offset, int length) {
        Hasher hasher = digest("SHA-256");
        hasher.update(bytes, offset, length);
        return hasher.hex();
    }

    private static Hasher digest(String name) {
        MessageDigest digest;
        try {
            digest = MessageDigest.getInstance(name);
        } catch (NoSuchAlgorithmException error) {
            throw new IllegalStateException("every Java has " + name, error);
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

    private static Hasher nothing() {
        return new Hasher() {
            @Override
            public void update(byte[] bytes, int offset, int length) {}

            @Override
            public String hex() {
                return "";
            }
        };
    }

    /** CRC-64/NVME, which S3 knows and Java does not. */
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
            for (int at = offset; at < offset + length; at++) {
                crc = TABLE[(int) (crc ^ bytes[at]) & 0xff] ^ (crc >>> 8);
            }
        }

        @Override
        public String hex() {
            return HexFormat.of().toHexDigits(~crc);
        }
    }
}
