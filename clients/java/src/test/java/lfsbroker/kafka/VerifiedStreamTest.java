package lfsbroker.kafka;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTimeoutPreemptively;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import org.junit.jupiter.api.Test;

class VerifiedStreamTest {
    private static final byte[] HELLO = "hello".getBytes(StandardCharsets.UTF_8);

    private static ObjectSource sourceOf(InputStream body) {
        return new ObjectSource() {
            @Override
            public InputStream open(Pointer pointer, String versionId) {
                return body;
            }

            @Override
            public void close() {}
        };
    }

    private static VerifiedStream stream(byte[] declared, InputStream found) {
        Checksum checksum = new Checksum("sha256", Checksum.sha256(declared, 0, declared.length));
        Pointer pointer = new Pointer("b", "k", declared.length, checksum, new byte[0]);
        return new VerifiedStream(pointer, sourceOf(found), null, Duration.ofMillis(200));
    }

    private static VerifiedStream stream(byte[] declared, String found) {
        return stream(declared, new ByteArrayInputStream(found.getBytes(StandardCharsets.UTF_8)));
    }

    @Test
    void bytesThatMatchThePointerAreRead() throws IOException {
        try (InputStream whole = stream(HELLO, "hello"); InputStream nothing = stream(new byte[0], "")) {
            assertArrayEquals(HELLO, whole.readAllBytes());
            assertEquals(-1, whole.read());
            assertEquals(-1, nothing.read());
        }
    }

    @Test
    void theLastByteOfCorruptBytesIsNotReturned() throws IOException {
        try (InputStream other = stream(HELLO, "hellO")) {
            assertArrayEquals("hell".getBytes(StandardCharsets.UTF_8), other.readNBytes(4));
            assertThrows(LfsException.Integrity.class, other::read);
        }
    }

    @Test
    void moreBytesThanThePointersSizeAreAnIntegrityError() throws IOException {
        try (InputStream more = stream(HELLO, "hello!"); InputStream some = stream(new byte[0], "!")) {
            assertThrows(LfsException.Integrity.class, more::readAllBytes);
            assertThrows(LfsException.Integrity.class, some::readAllBytes);
        }
    }

    @Test
    void fewerBytesAreAnIoExceptionBecauseARetryMayHelp() throws IOException {
        try (InputStream fewer = stream(HELLO, "hell")) {
            IOException error = assertThrows(IOException.class, fewer::readAllBytes);
            assertTrue(error.getMessage().contains("4 of 5 bytes"), error.getMessage());
        }
    }

    /** Returns nothing until it is closed. */
    private static final class StalledStream extends InputStream {
        private final CountDownLatch closed = new CountDownLatch(1);

        @Override
        public int read() throws IOException {
            try {
                closed.await();
            } catch (InterruptedException error) {
                throw new IllegalStateException(error);
            }
            throw new IOException("closed");
        }

        @Override
        public void close() {
            closed.countDown();
        }
    }

    @Test
    void aStalledReadTimesOut() {
        assertTimeoutPreemptively(Duration.ofSeconds(10), () -> {
            try (InputStream stalled = stream(HELLO, new StalledStream())) {
                assertEquals("closed", assertThrows(IOException.class, stalled::read).getMessage());
            }
        });
    }

    @Test
    void aMissingChecksumIsLoggedOnce() {
        try (var deserializer = new LfsStreamDeserializer()) {
            Checksum crc = Checksum.of(null, "crc32", "cbf43926");
            assertNull(deserializer.missingChecksumWarning(new Pointer("b", "verified", 1, crc, new byte[0])));
            Pointer bare = new Pointer("b", "bare", 1, Checksum.of(null, null, null), new byte[0]);
            deserializer.configure(Map.of("lfs.broker.url", "http://127.0.0.1:1"), false);
            deserializer.streamOf(bare, "videos", null);
            assertNull(deserializer.missingChecksumWarning(bare), "streamOf has already logged the warning");
        }
        try (var deserializer = new LfsStreamDeserializer()) {
            Pointer bare = new Pointer("b", "bare", 1, Checksum.of(null, "none", null), new byte[0]);
            assertTrue(deserializer.missingChecksumWarning(bare).startsWith("b/bare has no checksum"));
        }
    }

    @Test
    void nothingIsFetchedBeforeTheFirstRead() throws IOException {
        ObjectSource failing = new ObjectSource() {
            @Override
            public InputStream open(Pointer pointer, String versionId) throws IOException {
                throw new IOException("opened " + pointer + " " + versionId);
            }

            @Override
            public void close() {}
        };
        Pointer pointer = new Pointer("b", "k", 1, Checksum.of(null, null, null), new byte[0]);
        try (InputStream lazy = new VerifiedStream(pointer, failing, "v1", Duration.ofSeconds(1))) {
            assertEquals("opened b/k v1", assertThrows(IOException.class, lazy::read).getMessage());
        }
    }
}
