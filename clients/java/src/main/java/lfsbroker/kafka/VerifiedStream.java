package lfsbroker.kafka;

import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.time.Duration;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.TimeUnit;

/**
 * The bytes of a pointer's object, verified while they are read. The last bytes are returned only after the size and the
 * checksum of the whole object match the pointer. Nothing is fetched before the first read.
 */
final class VerifiedStream extends InputStream {
    /** Closes stalled downloads, because the JDK's HTTP client has no read timeout for a body. */
    private static final ScheduledThreadPoolExecutor READ_TIMEOUTS = newScheduler();

    private final Pointer pointer;
    private final ObjectSource source;
    private final String versionId;
    private final Duration readTimeout;
    private final Checksum.Hasher hasher;
    private InputStream body;
    private long receivedBytes;
    private boolean verified;
    private boolean closed;

    VerifiedStream(Pointer pointer, ObjectSource source, String versionId, Duration readTimeout) {
        this.pointer = pointer;
        this.source = source;
        this.versionId = versionId;
        this.readTimeout = readTimeout;
        this.hasher = pointer.checksum().hasher();
    }

    private static ScheduledThreadPoolExecutor newScheduler() {
        var scheduler = new ScheduledThreadPoolExecutor(1, task -> {
            Thread thread = new Thread(task, "lfs-broker-read-timeout");
            thread.setDaemon(true);
            return thread;
        });
        scheduler.setRemoveOnCancelPolicy(true);
        return scheduler;
    }

    @Override
    public int read() throws IOException {
        byte[] single = new byte[1];
        return read(single, 0, 1) == -1 ? -1 : single[0] & 0xff;
    }

    @Override
    public int read(byte[] buffer, int offset, int length) throws IOException {
        if (closed) {
            throw new IOException("the stream is closed");
        }
        if (length == 0) {
            return 0;
        }
        if (verified) {
            return -1;
        }
        if (body == null) {
            body = source.open(pointer, versionId);
        }
        int count = readBody(buffer, offset, (int) Math.min(length, Math.max(1, pointer.size() - receivedBytes)));
        if (count > 0 && receivedBytes + count > pointer.size()) {
            throw tooManyBytes();
        }
        if (count > 0) {
            hasher.update(buffer, offset, count);
            receivedBytes += count;
        }
        if (count == -1 || receivedBytes == pointer.size()) {
            verify(count == -1);
        }
        return count;
    }

    private void verify(boolean endOfBody) throws IOException {
        if (receivedBytes < pointer.size()) {
            // Not an integrity error: a broken connection also ends a body early, and then a retry helps.
            throw new IOException("the download of " + pointer + " ended after " + receivedBytes + " of " + pointer.size() + " bytes");
        }
        if (!endOfBody && readBody(new byte[1], 0, 1) != -1) {
            throw tooManyBytes();
        }
        String found = hasher.hex();
        if (!found.equals(pointer.checksum().hex())) {
            throw new LfsException.Integrity("the bytes of " + pointer + " are corrupt: expected " + pointer.checksum().algorithm()
                    + " " + pointer.checksum().hex() + ", found " + found);
        }
        verified = true;
    }

    private LfsException tooManyBytes() {
        return new LfsException.Integrity(
                "the bytes of " + pointer + " are corrupt: expected " + pointer.size() + " bytes, found more");
    }

    private int readBody(byte[] buffer, int offset, int length) throws IOException {
        ScheduledFuture<?> timeout = READ_TIMEOUTS.schedule(this::closeBody, readTimeout.toMillis(), TimeUnit.MILLISECONDS);
        try {
            return body.read(buffer, offset, length);
        } finally {
            timeout.cancel(false);
        }
    }

    private void closeBody() {
        try {
            body.close();
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
    }

    @Override
    public void close() throws IOException {
        closed = true;
        if (body != null) {
            body.close();
        }
    }
}
