/* The only program of a lab's machine: does what records in shared memory ask for, and writes answers beside them.
 *
 * Everything that means something is decided in Python (wire.py has the same numbers): this side opens files, makes
 * ioctls, runs guests, looks at vCPUs. It is the init of its kernel, so it mounts, loads KVM and never returns.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum op { OPEN = 1, CLOSE, IOCTL, READ, WRITE, MEMORY, STORE, GUEST, FREE, EXECUTE, WATCH, LOOK, CLOCK, SLEEP, QUIT, ANSWER, DEADLINE, PROGRAM, SURVEY, LIVE, EVENTFD, MAKE_READY };
enum { READY = 0x4654, HEADER = 4096, ARGUMENT = 1 << 16, SLOTS = 8192, PIECE = 1 << 20, EOIS = 64, MEMORY_BYTES = 0x10000, EXITS = 16, MSRS = 64, ACCESSES = 16 };
enum { PORT_DONE = 0x10, PORT_FAULT, PORT_INTERRUPT }; /* by which programs report themselves */
enum { LOOK_STATES = 1, LOOK_SREGS = 2, SET_REGS = 1, ANEW = 1 };

struct header {
	volatile uint32_t asked, request_bytes, spins, unused[13];
	volatile uint32_t done, answer_bytes, sleeping, ready;
};

struct record { uint16_t op, flags; uint32_t bytes; };
struct answer { int32_t result; uint32_t bytes; };

static struct header *header;
static uint8_t *requests, *answers, *answer_at, *answers_end;
static int bell = -1;

/* A line that names what is missing and ends the machine: there is nobody who could mend it. */
static void fail(const char *what)
{
	printf("fastexit-init: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	tcdrain(1);
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

#include "modules.h"

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* The kernel's ticks are due each TICK ns from PHASE on: an interrupt of the machine's, which is an exit of a guest's. */
static int64_t tick_ns, tick_phase;

static int64_t since_tick(int64_t time)
{
	return (time - tick_phase) % tick_ns;
}

/* The coarse clock moves with each tick; the earliest moment of some is nearest to when they are due. */
static void find_ticks(void)
{
	enum { TICKS = 4 };
	struct timespec last, t;
	int64_t earliest = INT64_MAX;

	clock_getres(CLOCK_MONOTONIC_COARSE, &t);
	tick_ns = t.tv_sec * 1000000000ll + t.tv_nsec;
	tick_phase = now() % tick_ns;
	for (int n = 0; n <= TICKS; n++) {
		clock_gettime(CLOCK_MONOTONIC_COARSE, &last);
		do
			clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
		while (t.tv_nsec == last.tv_nsec);
		if (n && since_tick(now() + tick_ns / 2) < earliest)
			earliest = since_tick(now() + tick_ns / 2);
		if (!n) /* the first one may have come out of idleness; the others are half a tick from the origin or so */
			tick_phase = now() % tick_ns;
	}
	tick_phase += earliest - tick_ns / 2;
}

/* Returns at a moment with no tick near it; which one it is. */
static int64_t between_ticks(void)
{
	enum { BEFORE_NS = 200000, BEHIND_NS = 20000 };
	int64_t time = now();

	while (since_tick(time) > tick_ns - BEFORE_NS || since_tick(time) < BEHIND_NS)
		time = now();
	return (time - tick_phase) / tick_ns;
}

/* ------------------------------------------------------------------------------------------------------ beginning */

static int number_in(const char *directory, const char *file)
{
	char path[512], text[32] = "";
	int fd;

	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", directory, file);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	if (read(fd, text, sizeof text - 1) < 0)
		text[0] = 0;
	close(fd);
	return strtol(text, NULL, 0);
}

static void map_shared_memory(void)
{
	DIR *devices = opendir("/sys/bus/pci/devices");
	struct dirent *entry;
	char path[512];
	struct stat found;
	int fd;

	while (devices && (entry = readdir(devices)))
		if (number_in(entry->d_name, "vendor") == 0x1af4 && number_in(entry->d_name, "device") == 0x1110)
			break;
	if (!devices || !entry)
		fail("no shared memory on the PCI bus");
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/enable", entry->d_name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "1", 1) != 1)
		fail(path);
	close(fd);
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/resource2", entry->d_name);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &found))
		fail(path);
	header = mmap(NULL, found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (header == MAP_FAILED)
		fail("mmap of shared memory");
	requests = (uint8_t *)header + HEADER;
	answers = (uint8_t *)header + found.st_size / 2;
	answers_end = (uint8_t *)header + found.st_size;
	closedir(devices);
}

static void open_bell(void)
{
	struct termios raw;

	bell = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (bell < 0 || tcgetattr(bell, &raw))
		fail("/dev/ttyS1");
	cfmakeraw(&raw);
	raw.c_cc[VMIN] = 1;
	raw.c_cc[VTIME] = 0;
	tcsetattr(bell, TCSANOW, &raw);
}

static void ignored(int number)
{
	(void)number; /* that it came is all: KVM_RUN returns with EINTR */
}

/* -------------------------------------------------------------------------------------------------------- answers */

/* Room for an answer's bytes; its result and length are written by put(). */
static uint8_t *room(size_t bytes)
{
	if (answer_at + sizeof(struct answer) + bytes + 8 > answers_end)
		return NULL;
	return answer_at + sizeof(struct answer);
}

static void put(int64_t result, size_t bytes)
{
	struct answer *answer = (struct answer *)answer_at;

	answer->result = result < 0 ? -errno : result;
	answer->bytes = bytes;
	answer_at += sizeof *answer + ((bytes + 7) & ~7ull);
}

static void put_error(int error)
{
	errno = error;
	put(-1, 0);
}

/* ------------------------------------------------------------------------------------------------- files and ioctls */

static void do_ioctl(const uint8_t *payload)
{
	static uint64_t buffer[ARGUMENT / 8];
	struct { uint32_t fd; uint16_t is_bytes, pointers; uint64_t request, value; } in;
	const uint32_t *fixups = (const uint32_t *)(payload + sizeof in);
	uint8_t *out;
	int64_t result;

	memcpy(&in, payload, sizeof in);
	if (!in.is_bytes) {
		put(ioctl(in.fd, in.request, in.value), 0);
		return;
	}
	if (in.value > sizeof buffer) {
		put_error(E2BIG);
		return;
	}
	memcpy(buffer, payload + sizeof in + 8 * in.pointers, in.value);
	for (int n = 0; n < in.pointers; n++) {
		uint64_t address = (uintptr_t)buffer + fixups[2 * n + 1];

		memcpy((uint8_t *)buffer + fixups[2 * n], &address, sizeof address);
	}
	result = ioctl(in.fd, in.request, buffer);
	if (result < 0 || !(in.request >> 31)) {
		put(result, 0);
		return;
	}
	out = room(in.value);
	if (!out) {
		put_error(ENOSPC);
		return;
	}
	memcpy(out, buffer, in.value);
	put(result, in.value);
}

/* Whole file, or what a pipe has right now. */
static void do_read(int fd, uint32_t most)
{
	uint8_t *out = room(most);
	uint32_t got = 0;
	ssize_t part = 0;

	if (!out) {
		put_error(ENOSPC);
		return;
	}
	while (got < most && (part = read(fd, out + got, most - got)) > 0)
		got += part;
	if (part < 0 && errno != EAGAIN && !got) {
		put(-1, 0);
		return;
	}
	put(got, got);
}

/* --------------------------------------------------------------------------------------------------------- guests */

static uint8_t *memories[SLOTS], *surveyed[SLOTS];
static uint32_t memory_bytes[SLOTS];
static struct { struct kvm_run *run; int fd; uint32_t bytes; } guests[SLOTS];

static void do_memory(int vm, uint32_t slot, uint32_t size)
{
	struct kvm_userspace_memory_region region = { .memory_size = size };
	uint8_t *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (bytes == MAP_FAILED || slot >= SLOTS) {
		put_error(ENOMEM);
		return;
	}
	region.userspace_addr = (uintptr_t)bytes;
	memories[slot] = bytes;
	memory_bytes[slot] = size;
	put(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), 0);
}

static void do_guest(int fd, uint32_t slot, uint32_t bytes)
{
	struct kvm_run *run = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (run == MAP_FAILED || slot >= SLOTS) {
		put_error(ENOMEM);
		return;
	}
	guests[slot].run = run;
	guests[slot].fd = fd;
	guests[slot].bytes = bytes;
	put(0, 0);
}

static void do_free(uint32_t what, uint32_t slot)
{
	if (what == MEMORY && memories[slot]) {
		munmap(memories[slot], memory_bytes[slot]);
		free(surveyed[slot]);
		memories[slot] = surveyed[slot] = NULL;
	} else if (what == GUEST && guests[slot].run) {
		munmap(guests[slot].run, guests[slot].bytes);
		guests[slot].run = NULL;
	}
	put(0, 0);
}

static void alarm_every(int64_t ns)
{
	struct itimerval timer = { { ns / 1000000000, ns % 1000000000 / 1000 }, { ns / 1000000000, ns % 1000000000 / 1000 } };

	setitimer(ITIMER_REAL, &timer, NULL);
}

/* An access of a guest's to what the kernel has no device for. */
struct access { uint64_t address, data; uint16_t port, length, write, unused; };

/* Answers an access with zeros, and notes it. */
static int answer_access(struct kvm_run *run, struct access *access)
{
	memset(access, 0, sizeof *access);
	if (run->exit_reason == KVM_EXIT_MMIO) {
		access->address = run->mmio.phys_addr;
		access->length = run->mmio.len;
		access->write = run->mmio.is_write;
		if (access->write)
			memcpy(&access->data, run->mmio.data, run->mmio.len);
		memset(run->mmio.data, 0, sizeof run->mmio.data);
	} else {
		uint8_t *data = (uint8_t *)run + run->io.data_offset;

		access->address = run->io.port;
		access->port = 1;
		access->length = run->io.size;
		access->write = run->io.direction == KVM_EXIT_IO_OUT;
		if (access->write)
			memcpy(&access->data, data, run->io.size);
		else
			memset(data, 0, run->io.size);
	}
	return run->exit_reason;
}

/* KVM_RUN until a program ends, its time is over, or an exit is for Python to answer. */
static void do_execute(const uint8_t *payload, int set_regs)
{
	struct { uint32_t slot, unused; uint64_t rax, rcx, rdx, rdi, rsp, rip, rflags, ns; } in;
	struct { uint32_t late, exit_reason, port, eax, edx, user, msr_reason, msr_index; uint64_t msr_data; uint32_t eois, accesses; } out = { 0 };
	struct access accesses[ACCESSES];
	struct kvm_regs regs = { 0 };
	struct kvm_run *run;
	uint8_t eois[EOIS], *bytes;
	int64_t due;
	int result = 0, fd, armed = 0;

	memcpy(&in, payload, sizeof in);
	run = guests[in.slot].run;
	fd = guests[in.slot].fd;
	if (set_regs) {
		regs.rax = in.rax;
		regs.rcx = in.rcx;
		regs.rdx = in.rdx;
		regs.rdi = in.rdi;
		regs.rsp = in.rsp;
		regs.rip = in.rip;
		regs.rflags = in.rflags;
		if (ioctl(fd, KVM_SET_REGS, &regs)) {
			put(-1, 0);
			return;
		}
	}
	due = now() + in.ns;
	for (;;) {
		if (!armed) {
			alarm_every(in.ns < 5000000 ? 3000000 : in.ns / 2);
			armed = 1;
		}
		result = ioctl(fd, KVM_RUN, 0);
		if (result && errno == EINTR && now() < due)
			continue;
		if (result) {
			out.late = errno == EINTR;
			break;
		}
		if (out.accesses < ACCESSES && (run->exit_reason == KVM_EXIT_MMIO ||
		    (run->exit_reason == KVM_EXIT_IO && (run->io.port < PORT_DONE || run->io.port > PORT_INTERRUPT)))) {
			out.user = answer_access(run, &accesses[out.accesses++]);
		} else if (run->exit_reason == KVM_EXIT_IOAPIC_EOI && out.eois < EOIS) {
			eois[out.eois++] = run->eoi.vector;
		} else {
			break;
		}
	}
	if (armed) {
		int kept = errno;

		alarm_every(0);
		errno = kept;
	}
	if (result && !out.late) {
		put(-1, 0);
		return;
	}
	out.exit_reason = run->exit_reason;
	if (!out.late && run->exit_reason == KVM_EXIT_IO) {
		out.port = run->io.port;
		if (ioctl(fd, KVM_GET_REGS, &regs)) {
			put(-1, 0);
			return;
		}
		out.eax = regs.rax;
		out.edx = regs.rdx;
	} else if (run->exit_reason == KVM_EXIT_X86_RDMSR || run->exit_reason == KVM_EXIT_X86_WRMSR) {
		out.msr_reason = run->msr.reason;
		out.msr_index = run->msr.index;
		out.msr_data = run->msr.data;
	}
	bytes = room(sizeof out + EOIS + sizeof accesses);
	if (!bytes) {
		put_error(ENOSPC);
		return;
	}
	memcpy(bytes, &out, sizeof out);
	memcpy(bytes + sizeof out, eois, out.eois);
	memcpy(bytes + sizeof out + out.eois, accesses, out.accesses * sizeof *accesses);
	put(0, sizeof out + out.eois + out.accesses * sizeof *accesses);
}

#include "program.h"

/* A TSC deadline so many ticks ahead of the guest's own TSC. */
static void do_deadline(const uint8_t *payload)
{
	struct { uint32_t fd, unused; uint64_t ticks; } in;
	struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = { { 1, 0 }, { 0x10, 0, 0 } };

	memcpy(&in, payload, sizeof in);
	if (ioctl(in.fd, KVM_GET_MSRS, &one) != 1) {
		put_error(EINVAL);
		return;
	}
	one.entry.index = 0x6e0;
	one.entry.data += in.ticks;
	put(ioctl(in.fd, KVM_SET_MSRS, &one), 0);
}

static void do_answer(const uint8_t *payload)
{
	struct { uint32_t slot, error; uint64_t data; } in;

	memcpy(&in, payload, sizeof in);
	guests[in.slot].run->msr.error = in.error;
	guests[in.slot].run->msr.data = in.data;
	put(0, 0);
}

#include "look.h"
#include "live.h"

/* ---------------------------------------------------------------------------------------------------------- batch */

static void carry_out(const struct record *record)
{
	const uint8_t *payload = (const uint8_t *)(record + 1);
	const uint32_t *words = (const uint32_t *)payload;

	switch (record->op) {
	case OPEN:
		put(open((const char *)(words + 1), words[0] | O_CLOEXEC), 0);
		break;
	case CLOSE:
		put(close(words[0]), 0);
		break;
	case IOCTL:
		do_ioctl(payload);
		break;
	case READ:
		do_read(words[0], words[1]);
		break;
	case WRITE:
		put(write(words[0], words + 2, words[1]), 0);
		break;
	case MEMORY:
		do_memory(words[0], words[1], record->bytes > 8 ? words[2] : MEMORY_BYTES);
		break;
	case STORE:
		if (words[0] >= SLOTS || !memories[words[0]] || words[1] + words[2] > memory_bytes[words[0]]) {
			put_error(EFAULT);
			break;
		}
		memcpy(memories[words[0]] + words[1], words + 4, words[2]);
		put(0, 0);
		break;
	case GUEST:
		do_guest(words[0], words[1], words[2]);
		break;
	case FREE:
		do_free(words[0], words[1]);
		break;
	case EXECUTE:
		do_execute(payload, record->flags & SET_REGS);
		break;
	case ANSWER:
		do_answer(payload);
		break;
	case WATCH:
		do_watch(words[0], (int)words[1]);
		break;
	case LOOK:
		do_look(words[0], words + 1, record->flags);
		break;
	case CLOCK: {
		int64_t ns = now(), *out = (int64_t *)room(sizeof ns);

		*out = ns;
		put(0, sizeof ns);
		break;
	}
	case SLEEP: {
		uint64_t ns = record->bytes < 8 ? words[0] : *(const uint64_t *)payload;
		struct timespec rest = { ns / 1000000000, ns % 1000000000 };

		nanosleep(&rest, NULL);
		put(0, 0);
		break;
	}
	case DEADLINE:
		do_deadline(payload);
		break;
	case PROGRAM:
		do_program(payload);
		break;
	case SURVEY:
		do_survey(words, record->flags & ANEW);
		break;
	case LIVE:
		do_live(payload);
		break;
	case EVENTFD:
		put(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), 0);
		break;
	case MAKE_READY:
		do_make_ready(payload);
		break;
	case QUIT:
		reboot(RB_POWER_OFF);
		break;
	default:
		put_error(ENOSYS);
	}
}

static void serve(void)
{
	uint32_t last = header->asked, waited = 0;
	char byte;

	header->ready = READY;
	for (;;) {
		if (header->asked == last) {
			if (waited++ < header->spins)
				continue;
			header->sleeping = 1;
			__sync_synchronize();
			if (header->asked == last && read(bell, &byte, 1) < 0 && errno != EINTR)
				fail("/dev/ttyS1");
			header->sleeping = 0;
			waited = 0;
			continue;
		}
		waited = 0;
		last = header->asked;
		__sync_synchronize();
		answer_at = answers;
		for (const uint8_t *at = requests, *end = requests + header->request_bytes; at < end;) {
			const struct record *record = (const struct record *)at;

			carry_out(record);
			at += sizeof *record + ((record->bytes + 7) & ~7u);
		}
		header->answer_bytes = answer_at - answers;
		__sync_synchronize();
		header->done = last;
	}
}

int main(void)
{
	struct sigaction action = { .sa_handler = ignored };

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mkdir("/tracing", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("tracefs", "/tracing", "tracefs", 0, NULL);
	load_modules();
	sigaction(SIGALRM, &action, NULL);
	open_bell();
	map_shared_memory();
	find_ticks();
	serve();
}
