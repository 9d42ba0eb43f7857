/* One round among peers (`federation.coordinator: none`), for Spin. README.md beside says what is modelled and what is not.

   Each hospital is one process, a loop of steps; each step is taken at once. What is said is never changed: who hears it later
   hears the same. A deviating hospital has no process: whoever waits for it hears what it likes, other things than the
   others hear, or nothing. All it cannot do is sign for others. */

#ifndef HOSPITALS
#define HOSPITALS 3 /* or 4 */
#endif
#ifndef QUORUM
#define QUORUM 3
#endif
#ifndef VIEWS
#define VIEWS 2 /* of the round; each has one sum at most */
#endif
#ifndef LOSSES
#define LOSSES 0 /* hospitals that are lost, at any moment, also in the middle of a word to all */
#endif
#ifndef RESUMES
#define RESUMES 0 /* times that all stop at once, and start again with what is on their disks; who was lost may stay away */
#endif
#ifndef RETURNS
#define RETURNS 0 /* times that one that was lost comes back while the others go on */
#endif
#ifndef LATES
#define LATES 0 /* times that somebody is taken for lost that is not */
#endif
#ifndef LATE_FROM
#define LATE_FROM 0 /* but for PRESENT and PROPOSAL, the first word that may be late ... */
#endif
#ifndef LOSS_FROM
#define LOSS_FROM 0 /* ... and the first one in the middle of which somebody may be lost: SIGNED for the block alone */
#endif

/* ---- sets of hospitals: bits ---------------------------------------------------------------------------------------- */

#define ONE(h) (1 << (h))
#define ALL (ONE(HOSPITALS) - 1)
#define NOBODY HOSPITALS
#define IN(h, set) (((set) >> (h)) & 1)
#define SIZE(set) (IN(0, set) + IN(1, set) + IN(2, set) + IN(3, set))
#define WITHIN(part, set) (((part) & ~(set)) == 0)
#if HOSPITALS == 3
#define WHO(is) (is(0) | (is(1) << 1) | (is(2) << 2))
#else
#define WHO(is) (is(0) | (is(1) << 1) | (is(2) << 2) | (is(3) << 3))
#endif
#ifdef DEVIATING
#define DEVIATES ONE(DEVIATING)
#define HONEST(h) ((h) != DEVIATING)
#else
#define DEVIATES 0
#define HONEST(h) (1)
#endif

/* ---- what is said ---------------------------------------------------------------------------------------------------- */

#define PRESENT 0    /* I am there for this view; what I hold of this round, and with whom the view before was lost */
#define PROPOSAL 1   /* U, and what those of U said of themselves */
#define AGREED 2     /* signature over the proposal */
#define TRANSCRIPT 3 /* signature over T */
#define SLICES 4
#define ARRIVED 5    /* whose slices came */
#define FIXED 6      /* V */
#define CONFIRM 7    /* signature over T and V */
#define TOTAL 8      /* and all words of the linear check after it */
#define KEYS 9
#define SIGNED 10    /* signature over the block */
#define FINISH 11    /* signature over a complete block, and that it is finished under this view */
#define COMPLETE 12  /* I have the signatures of all */
#define WORDS 13

#define AT(h, v) ((h) * VIEWS + (v))
#define NOW AT(h, view[h])
#define SAME_VIEW(i) AT(i, view[h])
#define THIS (view[h] + 1) /* a view by its number from 1, as 0 is none */
#define EACH (HOSPITALS * VIEWS)

typedef Heard { byte by[EACH] }
Heard heard[WORDS]; /* heard[word].by[AT(h, v)]: whose word h has heard in view v */

/* What a hospital said in a view, the same to all. */
typedef Presence {
  byte complete;            /* the block of this round that it has and has not kept, by the view in which it was signed, ... */
  byte complete_view;       /* ... and the view in which it got it, or last went on with it */
  byte parties;             /* of that block */
  byte made;                /* the view whose sum it holds */
  byte begun;               /* its openings that are in no block yet */
  byte blames               /* with whom it lost the view before */
}
Presence presence[EACH];
byte signed_transcript[EACH]; /* T */
byte came[EACH];              /* of ARRIVED */
byte signed_set[EACH];        /* of CONFIRM: V */
byte signed_openings[EACH];   /* of SIGNED: the openings in the block */

/* What a hospital was told in a view. */
byte proposal[EACH];          /* the bits of U, and one more for all else in it (plan, model) */
byte is_made[EACH];           /* in it, too: all of U hold the sum, only signatures are missing */
byte admitted[EACH];          /* V; the parties of the block */

/* ---- the state of each ----------------------------------------------------------------------------------------------- */

mtype = { say_present, await_proposal, sign_together, signed_plan, take_slices, fix, confirmed, checked_totals,
          open_among_peers, sign, finish_together, keep,
          done, lost, left_out, deviates, too_few }
mtype state[HOSPITALS] = say_present;
byte view[HOSPITALS];
byte made[HOSPITALS];           /* the view whose sum it holds */
byte blamed[HOSPITALS] = NOBODY;
byte complete[HOSPITALS];       /* as in its presence */
byte complete_view[HOSPITALS];
byte parties[HOSPITALS];
byte finishes[HOSPITALS];       /* whose block it finishes under its view */
bool forgets[HOSPITALS];        /* it has started again, and does not know what it said of a block that it signed before */

/* On its disk: */
byte charged[HOSPITALS];        /* privacy ledger: views whose release is charged */
byte begun[HOSPITALS];          /* openings.jsonl: views whose sum was begun to be opened */
byte kept[HOSPITALS];           /* the block of this round that it has gone on from */
bool unconfirmed[HOSPITALS];    /* it has signed a block of this round (unconfirmed_block.json) */

/* What left it, for the properties: */
byte released[HOSPITALS];       /* views in which its summand left */
byte gave_keys[HOSPITALS];      /* views in which its keys left, ... */
byte opened_over[EACH];         /* ... and for which V */

#ifdef DEVIATING
/* What the others signed, which a deviating hospital can show ever after, by views: who signed the block, and its parties when all
   of them have; who signed that a block is finished, and which one. */
byte block_signed_by[VIEWS];
byte block_shown[VIEWS];
byte finish_signed_by[VIEWS];
byte finish_shown[VIEWS];
#endif

byte losses = LOSSES;
byte resumes = RESUMES;
byte returns = RETURNS;
byte lates = LATES;

#define U (proposal[NOW] & ALL)
#define V (admitted[NOW])

/* ---- the rules that can be taken out --------------------------------------------------------------------------------- */

#ifdef WITHOUT_RULE_QUORUM
#define FEWEST (QUORUM - 1)
#else
#define FEWEST QUORUM
#endif
#ifdef WITHOUT_RULE_NEXT_PROPOSER
#define PROPOSER 0
#else
#define PROPOSER (view[h] % HOSPITALS)
#endif
#ifdef WITHOUT_RULE_ALL_SIGNED
#define ALL_SIGNED true
#else
#define ALL_SIGNED ALL_SAID(TRANSCRIPT, U)
#endif
#ifdef WITHOUT_RULE_ALL_CONFIRMED
#define ALL_CONFIRMED true
#else
#define ALL_CONFIRMED ALL_SAID(CONFIRM, V)
#endif
#define FORGETS(i) forgets[i]
#ifdef WITHOUT_RULE_RECALL
#define ENOUGH_FOR_A_PLAN(set) (SIZE(set) >= FEWEST)
#else
#define ENOUGH_FOR_A_PLAN(set) (SIZE(set) >= FEWEST && (SIZE((set) & ~WHO(FORGETS)) >= FEWEST || (set) == ALL))
#endif
#ifdef WITHOUT_RULE_COMPLETE
#define ENOUGH_COMPLETE true
#else
#define ENOUGH_COMPLETE (SIZE(CAN_HEAR(COMPLETE) & V) >= FEWEST)
#endif

#ifdef WITHOUT_RULE_FINISHED_BY_QUORUM
#define IS_FINISHED_UNDER(v, block) true
#else
#define IS_FINISHED_UNDER(v, block) (finish_shown[v] == (block) && SIZE(finish_signed_by[v] | DEVIATES) >= QUORUM)
#endif

/* ---- waiting ---------------------------------------------------------------------------------------------------------- */

#define HEARD(word) (heard[word].by[NOW] | ONE(h))
#define CAN_HEAR(word) (HEARD(word) | DEVIATES)
#define ALL_SAID(word, set) WITHIN(set, CAN_HEAR(word))
#define LACKING(word, set) ((set) & ~HEARD(word))

#define IS_ENDED(i) (state[i] == lost || state[i] == left_out || state[i] == deviates || state[i] == too_few)
#define IS_AHEAD(i) (!IS_ENDED(i) && kept[i] == 0 && view[i] > view[h])
#define IS_GONE(i) (IS_ENDED(i) || kept[i] != 0 || view[i] > view[h])
#define IS_DONE(i) (state[i] == done)
#define IS_AWAY(i) (IS_ENDED(i) || IS_AHEAD(i))
#define ENDED WHO(IS_ENDED)
#define GONE WHO(IS_GONE) /* it says nothing more in the view of h: its link is broken, or it said "void" and went on */
#define CAN_BE_LATE(word) (lates > 0 && ((word) <= PROPOSAL || (word) >= LATE_FROM))
#ifdef WITHOUT_RULE_DEADLINE
#define GIVES_UP(word, set) false
#else
#define GIVES_UP(word, set) (LACKING(word, set) != 0 && ((LACKING(word, set) & (GONE | DEVIATES)) != 0 || CAN_BE_LATE(word)))
#endif

inline forget_what_was_heard() {
  for (i : 0 .. WORDS - 1) { heard[i].by[NOW] = 0 }
  i = 0
}

/* What was said in a view that all have left says nothing any more. */
inline forget_what_was_said() {
  if
  :: WITHIN(ALL & ~DEVIATES & ~ONE(h), GONE) ->
     for (i : 0 .. HOSPITALS - 1) {
       presence[SAME_VIEW(i)].complete = 0;
       presence[SAME_VIEW(i)].complete_view = 0;
       presence[SAME_VIEW(i)].parties = 0;
       presence[SAME_VIEW(i)].made = 0;
       presence[SAME_VIEW(i)].begun = 0;
       presence[SAME_VIEW(i)].blames = 0;
       signed_transcript[SAME_VIEW(i)] = 0;
       came[SAME_VIEW(i)] = 0;
       signed_set[SAME_VIEW(i)] = 0;
       signed_openings[SAME_VIEW(i)] = 0;
       proposal[SAME_VIEW(i)] = 0;
       is_made[SAME_VIEW(i)] = 0;
       admitted[SAME_VIEW(i)] = 0;
#ifndef WITHOUT_RULE_ANEW
       opened_over[SAME_VIEW(i)] = 0
#endif
     }
  :: else
  fi;
  i = 0
}

inline change_view(whom) {
  blamed[h] = whom;
  forget_what_was_heard();
  forget_what_was_said();
  view[h] = view[h] + 1;
  state[h] = say_present
}

inline first_of(group) {
  for (i : 0 .. HOSPITALS - 1) { first = (IN(i, group) && first == NOBODY -> i : first) }
  i = 0
}

/* Somebody of `set` does not say `word`. It is blamed if it is lost or late, and not if it gave up itself. */
inline give_up(word, set) {
  if
#ifdef WITHOUT_RULE_VOID_IS_NO_LOSS
  :: (word) >= SIGNED && (LACKING(word, set) & (GONE | DEVIATES)) != 0 -> first_of(LACKING(word, set) & (GONE | DEVIATES))
  :: (word) < SIGNED && (LACKING(word, set) & (ENDED | DEVIATES)) != 0 -> first_of(LACKING(word, set) & (ENDED | DEVIATES))
  :: (word) < SIGNED && (LACKING(word, set) & (ENDED | DEVIATES)) == 0 && (LACKING(word, set) & GONE) != 0
#else
  :: (LACKING(word, set) & (ENDED | DEVIATES)) != 0 -> first_of(LACKING(word, set) & (ENDED | DEVIATES))
  :: (LACKING(word, set) & (ENDED | DEVIATES)) == 0 && (LACKING(word, set) & GONE) != 0
#endif
  :: (LACKING(word, set) & (GONE | DEVIATES)) == 0 -> lates--; first_of(LACKING(word, set))
  fi;
  change_view(first);
  first = NOBODY
}

/* `word` to all of `set`. Who is lost while it speaks is heard by some of them. */
inline say(word, set) {
  to = (set) & ~ONE(h) & ~DEVIATES;
  if
  :: true
  :: losses > 0 && (word) >= LOSS_FROM ->
     losses--;
     state[h] = lost;
     for (i : 0 .. HOSPITALS - 1) {
       if
       :: true
       :: IN(i, to) -> to = to & ~ONE(i)
       fi
     }
  fi;
  for (i : 0 .. HOSPITALS - 1) {
    if
    :: IN(i, to) && !IS_ENDED(i) && kept[i] == 0 && view[i] <= view[h] ->
       heard[word].by[SAME_VIEW(i)] = heard[word].by[SAME_VIEW(i)] | ONE(h)
    :: else
    fi
  }
  i = 0; to = 0
}

/* ---- properties ------------------------------------------------------------------------------------------------------- */

/* No mask leaves before all of U have signed the same T. */
inline require_all_signed() {
  for (i : 0 .. HOSPITALS - 1) {
    assert(!IN(i, U) || !HONEST(i) || signed_transcript[SAME_VIEW(i)] == proposal[NOW])
  }
  i = 0
}

/* Never two sets opened under one label: all of V have signed this V and this T, and no key left for another V. Nor one that is smaller
   than the quorum. */
inline require_one_set() {
  assert(SIZE(V) >= QUORUM);
  for (i : 0 .. HOSPITALS - 1) {
    assert(!IN(i, V) || !HONEST(i) || (signed_set[SAME_VIEW(i)] == V && signed_transcript[SAME_VIEW(i)] == proposal[NOW]));
#ifndef WITHOUT_RULE_ANEW
    assert(!HONEST(i) || opened_over[SAME_VIEW(i)] == 0 || opened_over[SAME_VIEW(i)] == V)
#else /* the label is that of the round */
    for (to : 0 .. VIEWS - 1) { assert(!HONEST(i) || opened_over[AT(i, to)] == 0 || opened_over[AT(i, to)] == V) }
    to = 0
#endif
  }
  i = 0
}

/* Never a charge forgotten, nor an opening: what left a hospital is on its disk, also when it was lost. */
inline require_nothing_forgotten(who) {
  assert(WITHIN(released[who], charged[who]));
  assert(WITHIN(gave_keys[who], begun[who]))
}

/* Never two blocks of one round. */
inline require_one_block() {
  for (i : 0 .. HOSPITALS - 1) { assert(!HONEST(i) || kept[i] == 0 || kept[i] == kept[h]) }
  i = 0
}

/* ---- parts of steps --------------------------------------------------------------------------------------------------- */

inline add_block(which) {
  kept[h] = which;
  forgets[h] = false;
  require_one_block();
  forget_what_was_heard();
  state[h] = done
}

/* Who of `set` is left out of a proposal: with whom more than half of those that are there have lost a sum, if enough are left. */
inline leave_out_the_blamed(set) {
  there = set;
  for (i : 0 .. HOSPITALS - 1) {
    for (to : 0 .. HOSPITALS - 1) { votes = votes + (IN(to, there) && HONEST(to) && presence[SAME_VIEW(to)].blames == i -> 1 : 0) }
    if
    :: i != h && 2 * votes > SIZE(there) -> set = set & ~ONE(i)
    :: i != h && (there & DEVIATES) != 0 && 2 * votes + 2 > SIZE(there) -> set = set & ~ONE(i)
    :: i == h || 2 * votes <= SIZE(there)
    fi;
    votes = 0
  }
#ifndef WITHOUT_RULE_ENOUGH_WITHOUT_THE_BLAMED
  set = (SIZE(set) < FEWEST -> there : set);
#endif
  i = 0; to = 0; there = 0
}

/* The block is signed, for all of V. */
inline sign_block() {
  signed_openings[NOW] = begun[h];
  unconfirmed[h] = true;
#ifdef DEVIATING
  block_signed_by[view[h]] = block_signed_by[view[h]] | ONE(h);
  differs = !WITHIN(V & ~DEVIATES, block_signed_by[view[h]]);
  for (i : 0 .. HOSPITALS - 1) {
    differs = differs || (IN(i, V) && HONEST(i) && (admitted[SAME_VIEW(i)] != V || signed_openings[SAME_VIEW(i)] != signed_openings[NOW]))
  }
  i = 0;
  block_shown[view[h]] = (differs -> block_shown[view[h]] : V);
  differs = false;
#endif
  state[h] = sign;
  say(SIGNED, V)
}

/* A deviating hospital may say under this view, to all alike, that it holds a block: one that it can show, made under an earlier view,
   and that it was finished under a later one. What it cannot show is found at once, and it is named. */
inline claim_a_block() {
#ifdef DEVIATING
  for (i : 0 .. VIEWS - 1) {
    for (to : 0 .. VIEWS - 1) {
      if
      :: true
      :: i <= to && to < view[h] && block_shown[i] != 0 && presence[AT(DEVIATING, view[h])].complete == 0 &&
         (i == to || IS_FINISHED_UNDER(to, i + 1)) ->
         presence[AT(DEVIATING, view[h])].complete = i + 1;
         presence[AT(DEVIATING, view[h])].complete_view = to + 1;
         presence[AT(DEVIATING, view[h])].parties = block_shown[i]
      fi
    }
  }
  i = 0; to = 0
#else
  skip
#endif
}

/* Whether all of `set` hold the same sum; a deviating one says so, or not. */
inline look_whether_made(set) {
  for (i : 0 .. HOSPITALS - 1) {
    if
    :: IN(i, set) && HONEST(i) -> first = (first == NOBODY || first == presence[SAME_VIEW(i)].made -> presence[SAME_VIEW(i)].made : 0)
    :: else
    fi
  }
  i = 0;
  if
  :: true -> is_made[NOW] = (first != NOBODY -> first : 0)
  :: (set & DEVIATES) != 0 -> is_made[NOW] = 0
  fi;
  first = NOBODY
}

/* ---- a hospital ------------------------------------------------------------------------------------------------------- */

proctype Hospital(byte h) {
  byte i, to, set, there, votes, latest;
  byte first = NOBODY;
  bool differs, two;
end:
  do
  /* ---- who takes part (`peer_attendance`) ---- */

  :: atomic { state[h] == say_present && view[h] < VIEWS ->
       presence[NOW].complete = complete[h];
       presence[NOW].complete_view = complete_view[h];
       presence[NOW].parties = parties[h];
       presence[NOW].made = made[h];
       presence[NOW].begun = begun[h];
       presence[NOW].blames = blamed[h];
       state[h] = await_proposal;
       say(PRESENT, ALL)
     }

  /* The proposer waits for all that are linked with it. */
  :: atomic { state[h] == await_proposal && PROPOSER == h && SIZE(ALL & ~ENDED) >= FEWEST &&
              (WITHIN(ALL & ~WHO(IS_AWAY), CAN_HEAR(PRESENT)) || (lates > 0 && SIZE(CAN_HEAR(PRESENT)) >= FEWEST)) ->
       if
       :: WITHIN(ALL & ~WHO(IS_AWAY), CAN_HEAR(PRESENT))
       :: else -> lates--
       fi;
       set = CAN_HEAR(PRESENT);
       if
       :: true
       :: DEVIATES != 0 && SIZE(HEARD(PRESENT)) >= FEWEST -> set = HEARD(PRESENT)
       fi;
       leave_out_the_blamed(set);
       if
       :: ENOUGH_FOR_A_PLAN(set) ->
          look_whether_made(set);
          claim_a_block();
          for (i : 0 .. HOSPITALS - 1) {
            if
            :: HONEST(i) && view[i] <= view[h] -> proposal[SAME_VIEW(i)] = set; is_made[SAME_VIEW(i)] = is_made[NOW]
            :: else
            fi
          }
          i = 0;
          state[h] = sign_together;
          say(PROPOSAL, ALL)
       :: else -> state[h] = too_few
       fi;
       set = 0
     }

#ifdef DEVIATING
  /* A deviating proposer: to each another U, of hospitals that are there, and another model. */
  :: atomic { state[h] == await_proposal && PROPOSER == DEVIATING && heard[PROPOSAL].by[NOW] == 0 &&
              SIZE(CAN_HEAR(PRESENT)) >= FEWEST ->
       set = ONE(h) | DEVIATES;
       for (i : 0 .. HOSPITALS - 1) {
         if
         :: IN(i, HEARD(PRESENT)) -> set = set | ONE(i)
         :: true
         fi
       }
       i = 0;
       if
       :: SIZE(set) >= FEWEST ->
          look_whether_made(set);
          claim_a_block();
          proposal[NOW] = set;
          if
          :: true
          :: proposal[NOW] = set | ONE(HOSPITALS)
          fi;
          heard[PROPOSAL].by[NOW] = DEVIATES
       :: else
       fi;
       set = 0
     }
#endif

  :: atomic { state[h] == await_proposal && PROPOSER != h && heard[PROPOSAL].by[NOW] != 0 ->
       if
       :: IN(h, U) && ENOUGH_FOR_A_PLAN(U) -> state[h] = sign_together; say(AGREED, ALL)
       :: IN(h, U) && !ENOUGH_FOR_A_PLAN(U) -> state[h] = too_few
       :: !IN(h, U) -> state[h] = left_out
       fi
     }
  /* Who is done sends no proposal, but the block. */
  :: atomic { state[h] == await_proposal && PROPOSER != h && SIZE(ALL & ~ENDED) >= FEWEST && !IS_DONE(PROPOSER) &&
              GIVES_UP(PROPOSAL, ONE(PROPOSER)) ->
       give_up(PROPOSAL, ONE(PROPOSER)) }
  /* A quorum, this one with it, is under a later view. */
  :: atomic { state[h] == await_proposal && SIZE(WHO(IS_AHEAD)) >= FEWEST - 1 -> change_view(NOBODY) }

  /* The plan holds. What was begun before comes to its end first (`peer_settling`): a block that one of U has is finished, of several
     that of the latest view, and nothing else is made. Who holds it sends it. Two of one view end the run. */
  :: atomic { state[h] == sign_together && ALL_SAID(AGREED, U & ~ONE(PROPOSER)) ->
       for (i : 0 .. HOSPITALS - 1) {
         differs = differs || (IN(i, U) && HONEST(i) && (proposal[SAME_VIEW(i)] != proposal[NOW] || is_made[SAME_VIEW(i)] != is_made[NOW]))
       }
       i = 0;
       forgets[h] = forgets[h] && (differs || U != ALL);
       for (i : 0 .. HOSPITALS - 1) {
         if
         :: IN(i, U) && presence[SAME_VIEW(i)].complete_view > latest ->
            latest = presence[SAME_VIEW(i)].complete_view; first = i; two = false
         :: IN(i, U) && presence[SAME_VIEW(i)].complete_view == latest && latest != 0 ->
            two = two || presence[SAME_VIEW(i)].complete != presence[SAME_VIEW(first)].complete
         :: else
         fi
       }
       i = 0; latest = 0;
#ifdef WITHOUT_RULE_FINISH
       first = NOBODY;
#endif
       if
       :: differs -> change_view(NOBODY)
       :: !differs && two -> state[h] = deviates
       :: !differs && !two && first != NOBODY && IN(first, GONE | DEVIATES) &&
          presence[NOW].complete != presence[SAME_VIEW(first)].complete -> change_view(first)
       :: !differs && !two && first != NOBODY && !IN(h, presence[SAME_VIEW(first)].parties) -> state[h] = left_out
       :: !differs && !two && first != NOBODY && IN(h, presence[SAME_VIEW(first)].parties) ->
          finishes[h] = first;
          admitted[NOW] = presence[SAME_VIEW(first)].parties & U;
#ifdef DEVIATING
          assert(finish_shown[view[h]] == 0 || finish_shown[view[h]] == presence[SAME_VIEW(first)].complete);
          finish_shown[view[h]] = presence[SAME_VIEW(first)].complete;
          finish_signed_by[view[h]] = finish_signed_by[view[h]] | ONE(h);
#endif
          state[h] = finish_together;
          say(FINISH, V)
       :: !differs && !two && first == NOBODY ->
#ifndef WITHOUT_RULE_SETTLE
          for (i : 0 .. HOSPITALS - 1) {
            if
            :: IN(i, U) && HONEST(i) -> begun[h] = begun[h] | presence[SAME_VIEW(i)].begun
            :: else
            fi
          }
          i = 0;
#endif
          if
          :: is_made[NOW] != 0 ->
             admitted[NOW] = U;
             sign_block()
          :: else ->
             made[h] = 0;
             signed_transcript[NOW] = proposal[NOW];
             state[h] = signed_plan;
             say(TRANSCRIPT, U)
          fi
       fi;
       first = NOBODY; differs = false; two = false
     }
  :: atomic { state[h] == sign_together && GIVES_UP(AGREED, U & ~ONE(PROPOSER)) -> give_up(AGREED, U & ~ONE(PROPOSER)) }

  /* ---- T is signed by all of U (`peer_plan`) ---- */

  :: atomic { state[h] == signed_plan && ALL_SIGNED ->
#ifndef WITHOUT_RULE_ALL_SIGNED
       for (i : 0 .. HOSPITALS - 1) {
         differs = differs || (IN(i, U) && HONEST(i) && signed_transcript[SAME_VIEW(i)] != proposal[NOW])
       }
       i = 0;
#endif
       if
       :: differs -> differs = false; state[h] = deviates
       :: else ->
#ifndef WITHOUT_RULE_CHARGE_FIRST
          charged[h] = charged[h] | ONE(view[h]);
#endif
          require_all_signed();
          released[h] = released[h] | ONE(view[h]);
          state[h] = take_slices;
          say(SLICES, U)
       fi
     }
  :: atomic { state[h] == signed_plan && GIVES_UP(TRANSCRIPT, U) -> give_up(TRANSCRIPT, U) }

  /* ---- the sum (`peer_sum`) ---- */

#ifdef WITHOUT_RULE_CHARGE_FIRST
  :: atomic { state[h] == take_slices && !IN(view[h], charged[h]) -> charged[h] = charged[h] | ONE(view[h]) }
#endif
  /* Whose slices came. Those of a deviating hospital did or did not. */
  :: atomic { state[h] == take_slices && IN(view[h], charged[h]) && (WITHIN(U & ~GONE, CAN_HEAR(SLICES)) || CAN_BE_LATE(SLICES)) ->
       if
       :: WITHIN(U & ~GONE, CAN_HEAR(SLICES))
       :: else -> lates--
       fi;
       came[NOW] = U & CAN_HEAR(SLICES);
       if
       :: true
       :: DEVIATES != 0 -> came[NOW] = U & HEARD(SLICES)
       fi;
       if
       :: IN(PROPOSER, came[NOW]) -> state[h] = fix; say(ARRIVED, ONE(PROPOSER))
       :: else -> change_view(PROPOSER)
       fi
     }

  /* The proposer names V, of which each has the slices of each. A deviating hospital may say that some did not come to it. */
  :: atomic { state[h] == fix && PROPOSER == h && heard[FIXED].by[NOW] == 0 &&
              (WITHIN(came[NOW] & ~GONE, CAN_HEAR(ARRIVED)) || CAN_BE_LATE(ARRIVED)) ->
       if
       :: WITHIN(came[NOW] & ~GONE, CAN_HEAR(ARRIVED))
       :: else -> lates--
       fi;
       set = came[NOW] & CAN_HEAR(ARRIVED);
       for (i : 0 .. HOSPITALS - 1) {
         if
         :: i == h || !IN(i, set) || !HONEST(i) || WITHIN(set, came[SAME_VIEW(i)])
         :: i != h && IN(i, set) && HONEST(i) && !WITHIN(set, came[SAME_VIEW(i)]) -> set = set & ~ONE(i)
         :: i != h && IN(i, set) && HONEST(i) && !WITHIN(set, came[SAME_VIEW(i)]) && IN(h, came[SAME_VIEW(i)]) ->
            set = set & came[SAME_VIEW(i)]
         :: i != h && IN(i, set) && (set & DEVIATES) != 0 -> set = set & ~ONE(i)
         fi
       }
       i = 0;
       if
       :: SIZE(set) >= FEWEST ->
          for (i : 0 .. HOSPITALS - 1) {
            if
            :: IN(i, U) && HONEST(i) -> admitted[SAME_VIEW(i)] = set
            :: else
            fi
          }
          i = 0;
          heard[FIXED].by[NOW] = ONE(h);
          say(FIXED, U)
       #ifdef WITHOUT_RULE_TOO_FEW_IS_A_LOST_SUM
       :: else -> state[h] = too_few
#else
       :: else -> change_view(NOBODY)
#endif
       fi;
       set = 0
     }

#ifdef DEVIATING
  :: atomic { state[h] == fix && PROPOSER == DEVIATING && heard[FIXED].by[NOW] == 0 ->
       set = ONE(h) | DEVIATES;
       for (i : 0 .. HOSPITALS - 1) {
         if
         :: IN(i, came[NOW]) -> set = set | ONE(i)
         :: true
         fi
       }
       i = 0;
       if
       :: SIZE(set) >= FEWEST -> admitted[NOW] = set; heard[FIXED].by[NOW] = DEVIATES
       :: else
       fi;
       set = 0
     }
#endif

  :: atomic { state[h] == fix && heard[FIXED].by[NOW] != 0 ->
       if
       :: !IN(h, V) -> state[h] = left_out
       :: IN(h, V) && WITHIN(V, came[NOW]) -> signed_set[NOW] = V; state[h] = confirmed; say(CONFIRM, U)
       :: else -> state[h] = deviates
       fi
     }
  :: atomic { state[h] == fix && PROPOSER != h && GIVES_UP(FIXED, ONE(PROPOSER)) -> give_up(FIXED, ONE(PROPOSER)) }

  :: atomic { state[h] == confirmed && ALL_CONFIRMED ->
#ifndef WITHOUT_RULE_ALL_CONFIRMED
       for (i : 0 .. HOSPITALS - 1) {
         differs = differs ||
                   (IN(i, V) && HONEST(i) && (signed_set[SAME_VIEW(i)] != V || signed_transcript[SAME_VIEW(i)] != proposal[NOW]))
       }
       i = 0;
#endif
       if
       :: differs -> differs = false; state[h] = deviates
       :: else -> state[h] = checked_totals; say(TOTAL, V)
       fi
     }
  :: atomic { state[h] == confirmed && GIVES_UP(CONFIRM, V) -> give_up(CONFIRM, V) }

#ifdef WITHOUT_RULE_RECORD_FIRST
  :: atomic { state[h] == open_among_peers && !IN(view[h], begun[h]) -> begun[h] = begun[h] | ONE(view[h]) }
#endif
  :: atomic { state[h] == checked_totals && ALL_SAID(TOTAL, V) ->
#ifndef WITHOUT_RULE_RECORD_FIRST
       begun[h] = begun[h] | ONE(view[h]);
#endif
       require_one_set();
       opened_over[NOW] = V;
       gave_keys[h] = gave_keys[h] | ONE(view[h]);
       state[h] = open_among_peers;
       say(KEYS, V)
     }
  :: atomic { state[h] == checked_totals && GIVES_UP(TOTAL, V) -> give_up(TOTAL, V) }

  /* The keys of one that is lost are known to others, unless it shares them with one that is not in V. */
  :: atomic { state[h] == open_among_peers && IN(view[h], begun[h]) &&
              (ALL_SAID(KEYS, V) || (V == U && SIZE(V & ~CAN_HEAR(KEYS)) == 1 && WITHIN(V & ~CAN_HEAR(KEYS), GONE))) ->
       made[h] = THIS;
       sign_block()
     }
  :: atomic { state[h] == open_among_peers && IN(view[h], begun[h]) && GIVES_UP(KEYS, V) -> give_up(KEYS, V) }

  /* ---- the block (`peer_signing`) ---- */

  :: atomic { state[h] == sign && ALL_SAID(SIGNED, V) ->
       for (i : 0 .. HOSPITALS - 1) {
         differs = differs || (IN(i, V) && HONEST(i) && (admitted[SAME_VIEW(i)] != V || signed_openings[SAME_VIEW(i)] != signed_openings[NOW]))
       }
       i = 0;
       if
       :: differs -> differs = false; state[h] = deviates
       :: else ->
          complete[h] = THIS;
          complete_view[h] = THIS;
          parties[h] = V;
          state[h] = keep;
          say(COMPLETE, V)
       fi
     }
  :: atomic { state[h] == sign && GIVES_UP(SIGNED, V) -> give_up(SIGNED, V) }

  /* All of its parties that are there have signed that the block is finished under this view: it counts as one of it from here on. */
  :: atomic { state[h] == finish_together && ALL_SAID(FINISH, V) ->
       if
       :: SIZE(V) >= FEWEST ->
          complete[h] = presence[SAME_VIEW(finishes[h])].complete;
          parties[h] = presence[SAME_VIEW(finishes[h])].parties;
          complete_view[h] = THIS;
          state[h] = keep;
          say(COMPLETE, V)
       :: else -> change_view(NOBODY)
       fi;
       finishes[h] = 0
     }
  :: atomic { state[h] == finish_together && GIVES_UP(FINISH, V) -> finishes[h] = 0; give_up(FINISH, V) }

  :: atomic { state[h] == keep && ENOUGH_COMPLETE -> add_block(complete[h]) }
  :: atomic { state[h] == keep && SIZE(HEARD(COMPLETE) & V) < FEWEST && GIVES_UP(COMPLETE, V) -> give_up(COMPLETE, V) }

  /* Who has gone on gives the block to those who say that they are there without it. */
  :: atomic { state[h] == await_proposal && WHO(IS_DONE) != 0 ->
       for (i : 0 .. HOSPITALS - 1) { first = (IN(i, WHO(IS_DONE)) -> i : first) }
       i = 0;
       if
       :: IN(h, parties[first]) -> complete[h] = kept[first]; parties[h] = parties[first]; add_block(kept[first])
       :: else -> state[h] = left_out
       fi;
       first = NOBODY
     }

  /* ---- losses ---- */

  :: atomic { losses > 0 && !IS_ENDED(h) && (LOSS_FROM == 0 || state[h] == sign || state[h] == keep || state[h] == done) ->
       losses--; state[h] = lost }
  od
}

/* When nothing is left to do: nothing was forgotten. With -DPROGRESS: while those that live are enough (after a stop: all), they have
   all kept the block. */
active proctype Rest() {
  byte i, live;
  timeout ->
  atomic {
    for (i : 0 .. HOSPITALS - 1) {
      require_nothing_forgotten(i);
      live = live + (state[i] == lost || state[i] == left_out -> 0 : 1)
    }
#ifdef PROGRESS
    for (i : 0 .. HOSPITALS - 1) { assert(live < (resumes < RESUMES -> HOSPITALS : QUORUM) || state[i] == lost || state[i] == left_out || state[i] == done) }
#endif
  }
}

#if RESUMES > 0
/* All stop, and start again under a view that none of them was in: their keys are new. A block that was complete and not kept is
   forgotten; so who has signed one is not counted on, unless all are there, of which any could have kept it. */
active proctype Stop() {
  byte i, h, last;
end:
  do
  :: atomic { resumes > 0 && view[0] < VIEWS - 1 && view[1] < VIEWS - 1 && view[2] < VIEWS - 1 && view[HOSPITALS - 1] < VIEWS - 1 ->
       resumes--;
       for (i : 0 .. HOSPITALS - 1) { last = (view[i] > last -> view[i] : last) }
       for (h : 0 .. HOSPITALS - 1) {
         forget_what_was_heard();
         made[h] = 0; complete[h] = 0; complete_view[h] = 0; blamed[h] = NOBODY; finishes[h] = 0;
         forgets[h] = unconfirmed[h] && kept[h] == 0;
         view[h] = last + 1;
         if
         :: state[h] = (kept[h] != 0 -> done : say_present)
         :: state[h] == lost
         fi
       }
       i = 0; h = 0; last = 0
     }
  od
}
#endif

#if RETURNS > 0
/* One that was lost starts again, with what is on its disk or with nothing, and is given what it lacks: under the next view of those
   that go on. What another start of it said is not taken for its own. */
active proctype Return() {
  byte i, h;
end:
  do
  :: atomic { returns > 0 && (state[0] == lost || state[1] == lost || state[2] == lost || state[HOSPITALS - 1] == lost) ->
       returns--;
       h = (state[0] == lost -> 0 : (state[1] == lost -> 1 : (state[2] == lost -> 2 : HOSPITALS - 1)));
       forget_what_was_heard();
       made[h] = 0; complete[h] = 0; complete_view[h] = 0; blamed[h] = NOBODY; finishes[h] = 0;
       if
       :: forgets[h] = unconfirmed[h]
       :: forgets[h] = true
       fi;
       if
       :: kept[h] != 0 -> state[h] = done
       :: kept[h] == 0 && view[h] + 1 < VIEWS ->
          view[h] = view[h] + 1;
          for (i : 0 .. HOSPITALS - 1) {
            if
            :: i != h && HONEST(i) && !IS_ENDED(i) && kept[i] == 0 && view[i] == view[h] && state[i] != say_present ->
               heard[PRESENT].by[NOW] = heard[PRESENT].by[NOW] | ONE(i)
            :: else
            fi
          }
          i = 0;
          state[h] = say_present
       :: kept[h] == 0 && view[h] + 1 == VIEWS
       fi;
       h = 0
     }
  od
}
#endif

#ifdef FROM_TWO_BLOCKS
/* Hospital 1 deviates. All signed a block under the first view, and it has withheld its own signature; under the second view all signed
   another one, which hospital 0 has kept before it was lost. The others have it complete, and go on under the third view. Whether such a state comes about is the matter of other checks. */
inline begin_with_two_blocks() {
  for (i : 0 .. HOSPITALS - 1) {
    if
    :: HONEST(i) ->
       view[i] = 2; made[i] = 1; charged[i] = 1; released[i] = 1; begun[i] = 1; gave_keys[i] = 1; unconfirmed[i] = true;
       blamed[i] = DEVIATING; complete[i] = 2; complete_view[i] = 2; parties[i] = ALL
    :: else
    fi
  }
  i = 0;
  state[0] = lost;
  kept[0] = 2;
  block_signed_by[0] = ALL & ~DEVIATES; block_shown[0] = ALL;
  block_signed_by[1] = ALL & ~DEVIATES; block_shown[1] = ALL
}
#endif

init {
  byte i;
  atomic {
#ifdef FROM_TWO_BLOCKS
    begin_with_two_blocks();
#endif
    for (i : 0 .. HOSPITALS - 1) {
      if
      :: HONEST(i) -> run Hospital(i)
      :: else
      fi
    }
  }
}
