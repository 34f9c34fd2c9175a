package lfsbroker.kafka;

import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.time.Duration;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.TimeUnit;

/**
 * The bytes behind a pointer, verified while they are read. The last of them is given out only once the whole has the
 * pointer's size and checksum: whoever has read everything has read the right thing. Nothing is fetched before the first read.
 */
final class VerifiedStream extends InputStream {
    /** Ends reads that stand still: the JDK's HTTP client bounds the wait for an answer, not for its body. */
    private static final ScheduledThreadPoolExecutor GUARD = guard();

    private final Pointer pointer;
    private final Source source;
    private final String versionId;
    private final Duration patience;
    private final Checksum.Hasher hasher;
    private InputStream body;
    private long received;
    private boolean proved;
    private boolean closed;

    VerifiedStream(Pointer pointer, Source source, String versionId, Duration patience) {
        this.pointer = pointer;
        this.source = source;
        this.versionId = versionId;
        this.patience = patience;
        this.hasher = pointer.checksum().hasher();
    }

    private static ScheduledThreadPoolExecutor guard() {
        var guard = new ScheduledThreadPoolExecutor(1, work -> {
            Thread thread = new Thread(work, "lfs-broker-guard");
            thread.setDaemon(true);
            return thread;
        });
        guard.setRemoveOnCancelPolicy(true);
        return guard;
    }

    @Override
    public int read() throws IOException {
        byte[] one = new byte[1];
        return read(one, 0, 1) == -1 ? -1 : one[0] & 0xff;
    }

    @Override
    public int read(byte[] into, int offset, int length) throws IOException {
        if (closed) {
            throw new IOException("the stream is closed");
        }
        if (length == 0) {
            return 0;
        }
        if (proved) {
            return -1;
        }
        if (body == null) {
            body = source.open(pointer, versionId);
        }
        int count = next(into, offset, (int) Math.min(length, Math.max(1, pointer.size() - received)));
        if (count > 0 && received + count > pointer.size()) {
            throw more();
        }
        if (count > 0) {
            hasher.update(into, offset, count);
            received += count;
        }
        if (count == -1 || received == pointer.size()) {
            prove(count == -1);
        }
        return count;
    }

    private void prove(boolean ended) throws IOException {
        if (received < pointer.size()) {
            // A broken connection ends a body early too; that the bytes are wrong is not said yet.
            throw new IOException(pointer + " ended after " + received + " of " + pointer.size() + " bytes");
        }
        if (!ended && next(new byte[1], 0, 1) != -1) {
            throw more();
        }
        String found = hasher.hex();
        if (!found.equals(pointer.checksum().hex())) {
            throw new LfsException.Integrity(
                    pointer + ": promised " + pointer.checksum().algorithm() + " " + pointer.checksum().hex() + ", found " + found);
        }
        proved = true;
    }

    private LfsException more() {
        return new LfsException.Integrity(pointer + " has more than the promised " + pointer.size() + " bytes");
    }

    private int next(byte[] into, int offset, int length) throws IOException {
        ScheduledFuture<?> guard = GUARD.schedule(this::abandon, patience.toMillis(), TimeUnit.MILLISECONDS);
        try {
            return body.read(into, offset, length);
        } finally {
            guard.cancel(false);
        }
    }

    private void abandon() {
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
