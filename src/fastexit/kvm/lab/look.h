/* Looking: what has changed in vCPUs and in their memory since the last look, for init.c. */

struct seen {
	struct kvm_lapic_state page;
	struct kvm_vcpu_events events;
	struct kvm_mp_state state;
	uint32_t refused; /* the error number of a KVM_GET_LAPIC that the kernel refused: an id that a page gave */
	struct kvm_sregs sregs;
};

static struct watched { int fd; struct seen seen; uint64_t msrs[MSRS]; } *watched[SLOTS];

static void do_watch(uint32_t slot, int fd)
{
	if (slot >= SLOTS) {
		put_error(ENOSPC);
		return;
	}
	if (fd < 0) {
		free(watched[slot]);
		watched[slot] = NULL;
	} else {
		watched[slot] = calloc(1, sizeof *watched[slot]);
		watched[slot]->fd = fd;
	}
	put(0, 0);
}

/* Pages, events and what else is asked for, of vCPUs one by one: dwords that are not what they were at the last look. */
static void do_look(uint32_t count, const uint32_t *slots, int flags)
{
	uint32_t *out, *start;
	size_t whole = sizeof(struct seen) / 4;

	start = out = (uint32_t *)room(count * (8 * whole + 8));
	if (!start) {
		put_error(ENOSPC);
		return;
	}
	for (uint32_t n = 0; n < count; n++) {
		struct watched *one = slots[n] < SLOTS ? watched[slots[n]] : NULL;
		struct seen now;
		uint32_t *head = out++, changed = 0, *old = (uint32_t *)&one->seen, *new = (uint32_t *)&now;

		if (!one) {
			put_error(ENOENT);
			return;
		}
		now = one->seen;
		now.refused = ioctl(one->fd, KVM_GET_LAPIC, &now.page) ? errno : 0;
		if (now.refused)
			now.page = one->seen.page;
		if (ioctl(one->fd, KVM_GET_VCPU_EVENTS, &now.events) ||
		    ((flags & LOOK_STATES) && ioctl(one->fd, KVM_GET_MP_STATE, &now.state)) ||
		    ((flags & LOOK_SREGS) && ioctl(one->fd, KVM_GET_SREGS, &now.sregs))) {
			put(-1, 0);
			return;
		}
		for (uint32_t at = 0; at < whole; at++)
			if (old[at] != new[at]) {
				*out++ = at;
				*out++ = old[at] = new[at];
				changed++;
			}
		*head = changed;
	}
	put(0, (uint8_t *)out - (uint8_t *)start);
}

typedef uint32_t __attribute__((may_alias)) dword;

static dword *differing(dword *out, void *kept, const void *seen, size_t count)
{
	dword *head = out++, *old = kept;
	const dword *new = seen;

	*head = 0;
	for (size_t at = 0; at < count; at++)
		if (old[at] != new[at]) {
			*out++ = at;
			*out++ = old[at] = new[at];
			++*head;
		}
	return out;
}

/* The same for memory, of which most is as it was. */
static dword *differing_pages(dword *out, void *kept, const void *seen, size_t count)
{
	enum { PAGE_DWORDS = 1024 };
	dword *head = out++, *old = kept;
	const dword *new = seen;

	*head = 0;
	for (size_t from = 0; from < count; from += PAGE_DWORDS) {
		size_t to = from + PAGE_DWORDS < count ? from + PAGE_DWORDS : count;

		if (!memcmp(old + from, new + from, (to - from) * 4))
			continue;
		for (size_t at = from; at < to; at++)
			if (old[at] != new[at]) {
				*out++ = at;
				*out++ = old[at] = new[at];
				++*head;
			}
	}
	return out;
}

/* As do_look with states, then MSRs of each vCPU, then a part of the guest's memory: each what is not as it was, or,
 * ``anew``, what is not 0. */
static void do_survey(const uint32_t *words, int anew)
{
	struct { uint32_t memory, from, bytes, vcpus, msrs; } in;
	struct { struct kvm_msrs head; struct kvm_msr_entry entries[MSRS]; } asked = { 0 };
	const uint32_t *slots, *indices;
	uint64_t values[MSRS] = { 0 };
	dword *out, *start;

	memcpy(&in, words, sizeof in);
	slots = words + sizeof in / 4;
	indices = slots + in.vcpus;
	start = out = (dword *)room(in.vcpus * (8 * sizeof(struct seen) / 4 + 16 * MSRS + 16) + 2 * in.bytes + 8);
	if (!start || in.msrs > MSRS || in.memory >= SLOTS || !memories[in.memory]) {
		put_error(ENOSPC);
		return;
	}
	for (uint32_t n = 0; n < in.vcpus; n++) {
		struct watched *one = slots[n] < SLOTS ? watched[slots[n]] : NULL;
		struct seen now;

		if (!one) {
			put_error(ENOENT);
			return;
		}
		if (anew) {
			memset(&one->seen, 0, sizeof one->seen);
			memset(one->msrs, 0, sizeof one->msrs);
		}
		now = one->seen;
		if (ioctl(one->fd, KVM_GET_LAPIC, &now.page) || ioctl(one->fd, KVM_GET_VCPU_EVENTS, &now.events) ||
		    ioctl(one->fd, KVM_GET_MP_STATE, &now.state)) {
			put(-1, 0);
			return;
		}
		out = differing(out, &one->seen, &now, sizeof now / 4);
		asked.head.nmsrs = in.msrs;
		for (uint32_t i = 0; i < in.msrs; i++)
			asked.entries[i] = (struct kvm_msr_entry){ indices[i], 0, 0 };
		*out++ = ioctl(one->fd, KVM_GET_MSRS, &asked);
		for (uint32_t i = 0; i < in.msrs; i++)
			values[i] = asked.entries[i].data;
		out = differing(out, one->msrs, values, 2 * in.msrs);
	}
	if (anew) {
		free(surveyed[in.memory]);
		surveyed[in.memory] = NULL;
	}
	if (!surveyed[in.memory])
		surveyed[in.memory] = calloc(1, in.bytes);
	out = differing_pages(out, surveyed[in.memory], memories[in.memory] + in.from, in.bytes / 4);
	put(0, (uint8_t *)out - (uint8_t *)start);
}
